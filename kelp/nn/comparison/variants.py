"""Variants of applying a network: whole images, slices, and the seed's hard-vote merge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kelp.config.choices import Interpolation, MergeMode, Precision
from kelp.config.shared import NetworkOptions
from kelp.errors import ConfigError
from kelp.inference.backends import Processor
from kelp.inference.backends.onnx import OnnxNet
from kelp.inference.bundle import Bundle
from kelp.inference.predictor import predict
from kelp.inference.spec import BundleSpec
from kelp.nn.backend import TorchBackend
from kelp.nn.device import autocast, resolve_device, resolve_precision
from kelp.nn.resize import pick, to_network
from kelp.raster.scene import Scene
from kelp.raster.window import Blend, Shape
from kelp.tiling.engine import Sink
from kelp.tiling.grid import TileGrid

WHOLE_IMAGE_TILE: Final = 128
"""Of a network that was trained on whole images."""

Pixels = NDArray[np.float32]
Kind = Literal["whole", "whole, upsampled", "sliced", "seed"]


@dataclass(frozen=True)
class Runtime:
    """Where and how networks are computed."""

    device: torch.device
    precision: Precision
    batch_size: int | None = None

    @classmethod
    def of(cls, options: NetworkOptions) -> Self:
        """As options say, on what is there."""
        device = resolve_device(options.device)
        return cls(device, resolve_precision(options.precision, device), options.batch_size)


@dataclass(frozen=True)
class Cost:
    """What a variant took for a scene."""

    seconds: float
    network_pixels: int
    """What the network saw, in its own pixels, over all tiles and symmetries."""


@dataclass(frozen=True)
class Variant:
    """A network and how it is applied."""

    name: str
    kind: Kind
    bundle: Bundle
    tile: int | None = None
    """Side of a tile in scene pixels; None = one tile as large as the scene."""
    overlap: int = 0
    blend: Blend = "mean"
    tta: MergeMode | None = None
    _at: dict[int, Bundle] = field(default_factory=dict, init=False, repr=False, compare=False)

    def run(self, scene: Scene, sink: Sink, runtime: Runtime, qa_as_nodata: bool) -> Cost:
        """Predict a scene, row by row."""
        started = time.perf_counter()
        if self.kind == "seed":
            network_pixels = _hard_votes(self, scene, sink, runtime)
        else:
            tile = self.tile or max(scene.shape)
            bundle = self._for(tile)
            predict(
                bundle,
                scene,
                sink,
                tile=tile,
                overlap=self.overlap,
                blend=self.blend,
                tta=self.tta,
                batch_size=runtime.batch_size if self.tile else 1,
                precision=runtime.precision,
                device="cpu" if runtime.device.type == "cpu" else "cuda",
                qa_as_nodata=qa_as_nodata,
            )
            rows, columns = bundle.spec.network_shape(Shape(tile, tile))
            crops = len(TileGrid(scene.shape, tile, self.overlap)) * (8 if self.tta else 1)
            network_pixels = crops * rows * columns
        return Cost(time.perf_counter() - started, network_pixels)

    @property
    def scale(self) -> float:
        """Network pixels for each scene pixel, along a side."""
        return 1.0 if self.kind == "whole" else self.bundle.spec.scale

    def side(self, shape: Shape) -> int:
        """Side of the largest picture that the network sees at once, in its own pixels."""
        tile = self.tile or max(shape)
        return max(self._for(tile).spec.network_shape(Shape(tile, tile)))

    def _for(self, tile: int) -> Bundle:
        """The bundle for tiles of that side, kept: networks are made ready once."""
        if self.tile is not None:
            return self.bundle
        if tile not in self._at:
            self._at[tile] = at_scale(self.bundle, tile, self.scale)
        return self._at[tile]

    def grid(self, shape: Shape, like: int) -> TileGrid:
        """Where its tiles meet; `like` is the tile where it has none, for comparison."""
        if self.tile is None:
            return TileGrid(shape, like, like // 2)
        return TileGrid(shape, self.tile, self.overlap)


def at_scale(bundle: Bundle, tile: int, scale: float) -> Bundle:
    """The network of a bundle, to be shown tiles of `tile` pixels at another scale."""
    return bundle.described(bundle.spec.at_scale(tile, scale))


def variants_of(
    bundle: Bundle,
    name: str,
    tile: int | None,
    overlaps: Sequence[int],
    tiles: Sequence[int],
    interpolations: Sequence[Interpolation],
    tta: bool,
) -> tuple[Variant, ...]:
    """All variants of applying one bundle; each but the first sliced one changes one thing of it.

    Args:
        bundle: a network of this package, not an ONNX file.
        name: what the names of its variants begin with; empty for a lone bundle.
        tile: of the sliced variants, in scene pixels; None: as `kelp predict` does it.
        overlaps: other overlaps than that.
        tiles: other tiles, at the same scale, with the same overlap where it fits.
        interpolations: others for resizing tiles.
        tta: also with the 8 symmetries of the square.
    """
    if isinstance(bundle.net, OnnxNet):
        raise ConfigError(
            f"{bundle.path}: an ONNX file takes tiles of one size only; name the run it was "
            "exported from"
        )
    prefix = f"{name}: " if name else ""
    scale = bundle.spec.scale
    trained = max(bundle.spec.tile_size) if bundle.spec.sahi else WHOLE_IMAGE_TILE
    tile, overlap = (tile, tile // 2) if tile else _default(bundle.spec, trained)
    wrong = [other for other in overlaps if not 0 <= other < tile]
    if wrong:
        raise ConfigError(f"--overlaps {wrong[0]}: must lie between 0 and {tile - 1} px")
    main = sliced(prefix, bundle, tile, overlap, "hann")
    variants = [Variant(f"{prefix}whole image", "whole", bundle), main]
    if bundle.spec.is_pixelwise:  # nothing else could make a difference, nor does slicing
        return tuple(variants)
    if scale != 1:
        words = f"{prefix}whole image, enlarged {scale:g} times"
        variants.insert(1, Variant(words, "whole, upsampled", bundle))
    variants.append(sliced(prefix, bundle, tile, overlap, "mean"))
    variants += [sliced(prefix, bundle, tile, other, "hann") for other in overlaps]
    variants += [
        sliced(prefix, bundle, other, other // 2, "hann")
        for other in (*tiles, trained)
        if other != tile
    ]
    if scale != 1:  # else nothing is resized
        for interpolation in interpolations:
            if interpolation != bundle.spec.interpolation:
                spec = bundle.spec.model_copy(update={"interpolation": interpolation})
                changed = replace(main, bundle=bundle.described(spec))
                variants.append(replace(changed, name=f"{main.name}, {interpolation}"))
    if tta:
        variants.append(replace(main, name=f"{main.name}, 8 symmetries", tta="mean"))
    variants.append(Variant(f"{prefix}the seed's merge", "seed", bundle, trained, trained // 2))
    return tuple({one.name: one for one in variants}.values())


def _default(spec: BundleSpec, trained: int) -> tuple[int, int]:
    """Tile and overlap of `kelp predict`, or what would be if it cut."""
    if spec.prediction_tile:
        return spec.prediction_tile, spec.prediction_overlap or 0
    return trained, trained // 2


def sliced(prefix: str, bundle: Bundle, tile: int, overlap: int, blend: Blend) -> Variant:
    """A sliced variant at the scale of its bundle."""
    scale = bundle.spec.scale
    shown = bundle if (tile, tile) == bundle.spec.tile_size else at_scale(bundle, tile, scale)
    words = f"{prefix}sliced {tile} px, overlap {overlap} px, {blend}"
    return Variant(words, "sliced", shown, tile, overlap, blend)


@torch.inference_mode()
def _hard_votes(variant: Variant, scene: Scene, sink: Sink, runtime: Runtime) -> int:
    """The original's merge: tiles beyond the edge padded with 0, hard votes, their majority.

    Given as the probabilities that say so at every threshold (see `majority`), so that the tiles'
    threshold is fitted like any other. Returns the network pixels.
    """
    bundle, tile = variant.bundle, variant.tile
    assert tile is not None
    processor = Processor(runtime.device.type, runtime.precision, torch.get_num_threads())
    backend = bundle.on(processor)
    assert isinstance(backend, TorchBackend)
    net = backend.module
    height, width = scene.shape
    rows, columns = bundle.spec.network_shape(Shape(tile, tile))
    grid = TileGrid(scene.shape, tile, variant.overlap, edge="pad")
    stride = tile - variant.overlap
    # Overlaps are half a tile at most: every second tile of an axis meets none of its like, and
    # a row of pixels lies in this row of tiles and the one before.
    layers = np.full((4, 2 * tile, width), np.nan, dtype=np.float32)
    for number, y in enumerate(grid.rows):
        k = number % 2
        layers[2 * k : 2 * k + 2] = np.nan
        for at in grid.row(y):
            inside = at.clipped(scene.shape)
            raw = torch.from_numpy(scene.read(inside))[None].to(runtime.device)
            part = net.preprocess(raw)
            part = functional.pad(part, (0, tile - inside.width, 0, tile - inside.height))
            if bundle.spec.resize_strategy == "resize":
                part = to_network(part, rows, "nearest")
            else:
                part = functional.pad(part, (0, columns - tile, 0, rows - tile))
            with autocast(runtime.precision, runtime.device):
                logits = net.body(part.contiguous(memory_format=torch.channels_last))[:, 0].float()
            p = torch.sigmoid(logits / bundle.spec.temperature)
            if bundle.spec.resize_strategy == "resize":
                p = pick(p, tile, "nearest")
            layer = layers[2 * k + inside.x // stride % 2, : inside.height]
            layer[:, inside.x : inside.right] = p[0, : inside.height, : inside.width].cpu().numpy()
        # Rows that no later row of tiles reaches; the layers of the row before lie `stride` higher.
        done = stride if y != grid.rows[-1] else height - y
        before = layers[2 * (1 - k) : 4 - 2 * k, stride : stride + done]
        sink.write(y, majority(np.concatenate([layers[2 * k : 2 * k + 2, :done], before])))
    sink.close()
    return len(grid) * rows * columns


def majority(layers: Pixels) -> Pixels:
    """What more than half of the tiles at a pixel reach: the lower median of their probabilities.

    Law: it is at least t just where more than half of the tiles are. So the majority of hard votes
    at any threshold of the tiles is this map at that threshold.

    Args:
        layers: `(layers, height, width)`, NaN = no tile.

    Returns:
        `(height, width)`; NaN where there is no tile.
    """
    tiles = np.isfinite(layers).sum(axis=0)
    lower = np.maximum(tiles - 1, 0) // 2
    ascending = np.sort(layers, axis=0)  # NaN last
    middle: Pixels = np.take_along_axis(ascending, lower[None], axis=0)[0]
    return middle
