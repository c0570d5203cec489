"""Which pixels count as bad: quality bits by name, and masks from elsewhere.

A *flag* is a named statement about a pixel, found in one quality layer of a product: a bit, or
certain values of some bits. A *policy* is the set of flags that make a pixel not observed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from kelp.errors import ConfigError, InputError
from kelp.raster.georeference import crs_words
from kelp.raster.masks import is_gdal_error, quietly, require_one_band
from kelp.raster.validity import MaskBands, masked_as
from kelp.raster.window import Shape, Tile
from kelp.sensors.record import Source

NAMES: Final = (
    "fill",
    "cloud",
    "dilated_cloud",
    "cirrus",
    "shadow",
    "snow",
    "saturated",
    "dropped",
    "occluded",
    "high_aerosol",
)
"""Every name that `--quality` takes; no sensor has all of them."""
NONE: Final = "none"


@dataclass(frozen=True)
class Flag:
    """A statement about a pixel, read from one layer."""

    layer: str
    mask: int
    """The bits that are looked at."""
    values: tuple[int, ...] | None = None
    """What they must be; None = any of them is set."""

    def holds(self, layer: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Where it is true, in a layer as stored."""
        bits = layer & layer.dtype.type(self.mask)
        held: NDArray[np.bool_]
        if self.values is None:
            held = bits != 0
            return held
        table = np.zeros(self.mask + 1, dtype=np.bool_)
        table[list(self.values)] = True
        held = table[bits]
        return held


def parse_policy(names: Sequence[str]) -> tuple[str, ...]:
    """A policy as given by the user, in the order of `NAMES`.

    Raises:
        ConfigError: a name that no sensor has.
    """
    given = [name.strip().lower() for name in names if name.strip()]
    unknown = [name for name in given if name not in (*NAMES, NONE)]
    if unknown:
        raise ConfigError(
            f"--quality: there is no bit {unknown[0]!r}; choose from {', '.join(NAMES)}, or none"
        )
    if NONE in given and len(set(given)) > 1:
        raise ConfigError("--quality: none stands alone")
    return tuple(name for name in NAMES if name in given)


@dataclass
class Shares:
    """Counts how many pixels each flag holds for, and how many the policy takes away."""

    pixels: int = 0
    bad: int = 0
    hits: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> dict[str, float]:
        """Share of the pixels for which each flag holds, 0-1."""
        return {name: count / max(self.pixels, 1) for name, count in self.hits.items()}

    @property
    def bad_share(self) -> float:
        """Share of the pixels that the policy takes away, 0-1."""
        return self.bad / max(self.pixels, 1)


@dataclass(frozen=True)
class Policy:
    """The flags of one product, and those among them that make a pixel bad.

    Args:
        flags: all flags whose layers are there.
        bad: names of those that count.
    """

    flags: Mapping[str, Flag]
    bad: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that the policy needs, in the order of their names."""
        return tuple(sorted({self.flags[name].layer for name in self.bad}))

    def decide(self, layers: Mapping[str, NDArray[np.integer[Any]]]) -> NDArray[np.bool_] | None:
        """Where pixels are bad; None where no flag counts."""
        out: NDArray[np.bool_] | None = None
        for flag in self._merged:
            found = flag.holds(layers[flag.layer])
            out = found if out is None else np.logical_or(out, found, out=out)
        return out

    @cached_property
    def _merged(self) -> tuple[Flag, ...]:
        """The flags that count; single bits of a layer are looked at together."""
        bits: dict[str, int] = {}
        others = []
        for flag in (self.flags[name] for name in self.bad):
            if flag.values is None:
                bits[flag.layer] = bits.get(flag.layer, 0) | flag.mask
            else:
                others.append(flag)
        return (*(Flag(layer, mask) for layer, mask in bits.items()), *others)

    def count(
        self,
        layers: Mapping[str, NDArray[np.integer[Any]]],
        shares: Shares,
        hidden: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a window's pixels to `shares`, those that masks hide as bad ones.

        Flags whose layer is not given are left out.
        """
        for name, flag in self.flags.items():
            if flag.layer in layers:
                hits = int(np.count_nonzero(flag.holds(layers[flag.layer])))
                shares.hits[name] = shares.hits.get(name, 0) + hits
        bad = self.decide(layers)
        if hidden is not None:
            bad = hidden if bad is None else bad | hidden
        shares.bad += 0 if bad is None else int(np.count_nonzero(bad))
        shares.pixels += next(iter(layers.values())).size


def choose(
    where: str,
    flags: Mapping[str, Flag],
    layers: Iterable[str],
    wanted: Sequence[str],
    default: Sequence[str],
    given: bool,
) -> tuple[Policy, tuple[str, ...]]:
    """The policy of one product.

    Args:
        where: the product, for messages.
        flags: those that its sensor has.
        layers: the quality layers that are there.
        wanted: names that the user gave, see `parse_policy`.
        default: names that count where the user gave none.
        given: whether the user gave any (`none` gives an empty list).

    Returns:
        The policy, and those wanted names that the sensor does not have.

    Raises:
        InputError: a flag that counts needs a layer that is not there.
    """
    there = set(layers)
    names = tuple(wanted) if given else tuple(default)
    bad = tuple(name for name in names if name in flags)
    usual = tuple(name for name in default if name in flags)
    if set(bad) == set(usual):
        bad = usual  # the same policy, in the same words: maps know it by its text
    missing = sorted({flags[name].layer for name in bad} - there)
    if missing:
        need = ", ".join(name for name in bad if flags[name].layer == missing[0])
        raise InputError(
            f"{where}: the quality layer {missing[0]} is missing ({need} are read from it); "
            "fetch it, name other bits with --quality (or none), or give a --cloud_mask"
        )
    known = {name: flag for name, flag in flags.items() if flag.layer in there}
    return Policy(known, bad), tuple(name for name in names if name not in flags) if given else ()


_EXACT: Final = 1e-6
"""Pixels by which a warped pixel may be misplaced: which one is nearest must not depend on the
window that is read."""
_UNKNOWN: Final = -32768
"""Stands for pixels of a cloud mask that are missing, or outside it."""


class CloudMask:
    """A mask raster on the grid of a scene, read by windows: all but 0 is bad.

    What the mask does not know (its nodata, unless that is 0, what a mask or alpha band of its own
    hides, and all outside it) is bad. A mask on another grid is warped (nearest neighbour).
    `close` it.

    Args:
        path: the raster.
        shape: of the scene.
        crs: of the scene.
        affine: the scene's transform.

    Raises:
        InputError: not a raster, or nothing says where it lies.
    """

    def __init__(self, path: Path, shape: Shape, crs: Any, affine: Affine | None) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"--cloud_mask {path}: no such file; check the path")
        with quietly(path):
            self._file = rasterio.open(path)
        self._dataset: Any = self._file
        self._hidden: MaskBands | None = None
        self._stack = ExitStack()
        self._stack.callback(self._file.close)
        try:
            require_one_band(self._file, f"--cloud_mask {path}", "a mask")
        except InputError:
            self.close()
            raise
        placed = self._file.crs is not None and crs is not None and affine is not None
        if not placed:
            if (self._file.height, self._file.width) != shape:
                self.close()
                raise InputError(
                    f"--cloud_mask {path}: without a georeference it must have the scene's "
                    f"{shape[0]} x {shape[1]} pixels"
                )
            self._hidden = MaskBands(self._file, [1])
            return
        tag = self._file.nodata
        void = _UNKNOWN if tag in (None, 0) else tag
        source = self._file
        if (masked := masked_as(source, void)) is not None:
            with quietly(path):
                source = self._stack.enter_context(rasterio.open(masked))
        try:
            self._dataset = WarpedVRT(
                source,
                crs=crs,
                transform=affine,
                height=shape[0],
                width=shape[1],
                resampling=Resampling.nearest,
                src_nodata=void,
                nodata=_UNKNOWN,
                dtype="float32",
                tolerance=_EXACT,
            )
        except Exception as error:
            if not is_gdal_error(error):
                raise
            raise InputError(
                f"--cloud_mask {path}: its CRS ({crs_words(self._file.crs)}) cannot be transformed "
                f"to that of the scene ({crs_words(crs)}); give the mask on the scene's grid"
            ) from error
        self._stack.enter_context(self._dataset)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, tile: Tile) -> NDArray[np.bool_]:
        """Where a window is bad: bool, shape `(height, width)`."""
        with quietly(self.path):
            bad: NDArray[np.bool_] = self._dataset.read(1, window=tile.window) != 0
            hidden = self._hidden.missing(tile.window) if self._hidden is not None else None
        return bad if hidden is None else bad | hidden[0]

    @cached_property
    def source(self) -> Source:
        """What the record says of it."""
        return Source.of_file("cloud_mask", self.path)


def find_mask(path: Path, name: str) -> Path:
    """The cloud mask of a scene: the file itself, or `<name>*.tif` in a folder.

    Raises:
        InputError: no such file, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(
        file
        for file in path.iterdir()
        if file.name.startswith(name) and file.suffix.lower() in (".tif", ".tiff", ".vrt")
    )
    if len(found) != 1:
        what = "no mask" if not found else f"{len(found)} masks"
        raise InputError(f"--cloud_mask {path}: holds {what} {name}*.tif; one a scene is wanted")
    return found[0]
