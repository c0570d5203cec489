"""Spectral indices: the formulas of `indices.csv`, over numpy arrays and torch tensors alike.

`kelp stats` (numpy) and the network's preprocessing (torch) call the same functions, so that
statistics and training cannot disagree. Formulas use operators only; what differs between the
two libraries is in `_missing_where`, and torch is never imported here.

`indices.csv` begins with the seventeen of the competition. MCARI is published with the red edge
(700 nm), which Landsat lacks: NIR takes its place. FAI's factor is of 865, 655 and 1610 nm. Left
out: indices whose denominator passes through zero on ordinary surfaces (EVI, ARVI, GARI, VARI), and
those that take roots of differences.

`index_input="dn"`, the default of networks, puts the stored integers into the formulas as they
are. Their offset of 0.2 does not cancel in a ratio, so values are not the published ones; but no
denominator comes near zero over dark water, and networks score better (docs/experiments.md).
`"reflectance"` is what the definitions are published for. Over dark water it is near zero or
below: so it is clipped to `REFLECTANCE_RANGE` first, and the index to its own range last.
"""

from __future__ import annotations

import ast
import csv
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from kelp.errors import ConfigError
from kelp.raster.bands import BANDS, OPTICAL, REFLECTANCE_OFFSET, REFLECTANCE_SCALE, IndexInput

Array = TypeVar("Array")
"""A numpy array or a torch tensor of floats; every argument and the result are of one kind."""

REFLECTANCE_RANGE: Final = (0.001, 1.2)
"""Reflectance is clipped to this before ratios: dark water stays positive, glint and cloud end."""

# Nearer to zero than this a denominator is zero; beyond the other a stored value is missing.
# Together they keep every formula finite in float32 (at most 1e7 * 1e7 / 1e-6).
_ZERO: Final = 1e-6
_LARGEST: Final = 1e7


@dataclass(frozen=True)
class IndexSettings:
    """What turns bands into index channels, the same in statistics, training and prediction."""

    index_input: IndexInput
    """The stored integers as they are, or surface reflectance."""
    mask_using_qa: bool
    """Index channels are missing where QA = 1."""
    mask_using_water_mask: bool
    """Index channels are missing on land (DEM > 0)."""


@dataclass(frozen=True)
class Index:
    """One spectral index, a row of `indices.csv`."""

    name: str
    """Short name, as `--spectral_indices` takes it."""
    long_name: str
    """Name in full."""
    formula: str
    """Over names of bands: `+`, `-`, `*`, `/`, numbers, and `max(BAND, 0)`."""
    low: float
    """Least value with reflectance; smaller ones are clipped to it."""
    high: float
    """Greatest value with reflectance. Where the definition has no bound: a bound of ours, beyond
    what land, water and vegetation reach, that keeps near-zero denominators from exploding."""
    source: str
    """Where the formula is published."""

    @cached_property
    def _tree(self) -> ast.expr:
        return ast.parse(self.formula, mode="eval").body

    @cached_property
    def bands(self) -> tuple[str, ...]:
        """Bands of the formula, in the order of `BANDS`."""
        named = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        return tuple(name for name in BANDS if name in named)

    @property
    def masked(self) -> bool:
        """Whether `--mask_using_qa` and `--mask_using_water_mask` apply.

        Not to elevation: that is the land mask itself, and would be 0 everywhere.
        """
        return "DEM" not in self.bands

    def evaluate(self, bands: Mapping[str, Any]) -> Any:
        """The formula over planes of equal shape, by band name."""
        return _value(self._tree, bands)


def _value(node: ast.expr, bands: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(name):
            return bands[name]
        case ast.Constant(number):
            return number
        case ast.Call(ast.Name("max"), [plane, ast.Constant(least)]):
            return _value(plane, bands).clip(min=least)
        case ast.BinOp(left, ast.Div(), ast.Constant(number)):
            return _value(left, bands) / number
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
            compute = _OPERATIONS[type(operation)]
            return compute(_value(left, bands), _value(right, bands))
    raise ValueError(f"not part of a formula: {ast.unparse(node)}")


def _missing_where(values: Any, condition: Any) -> Any:
    """`values` with NaN where `condition` holds."""
    if hasattr(values, "masked_fill"):  # a torch tensor
        return values.masked_fill(condition, float("nan"))
    return np.where(condition, np.nan, values)


def ratio(numerator: Any, denominator: Any) -> Any:
    """Quotient that is missing (NaN), never infinite, where the denominator is zero."""
    return numerator / _missing_where(denominator, abs(denominator) < _ZERO)


_OPERATIONS: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: ratio,
}


def _read() -> Iterator[Index]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            low, high = float(row.pop("low")), float(row.pop("high"))
            yield Index(low=low, high=high, **row)


INDICES: Final[Mapping[str, Index]] = {index.name: index for index in _read()}
"""Every index by its name, in the order of `--spectral_indices all`."""

_BY_LOWER_CASE: Final = {name.lower(): name for name in INDICES}


def get_index(name: str) -> Index:
    """The index of that name, in any case of letters. Raises `ConfigError` with the choices."""
    known = _BY_LOWER_CASE.get(name.strip().lower())
    if known is not None:
        return INDICES[known]
    close = get_close_matches(name.strip().lower(), _BY_LOWER_CASE, n=1)
    hint = f"did you mean {_BY_LOWER_CASE[close[0]]}? " if close else ""
    raise ConfigError(
        f"unknown spectral index {name!r}: {hint}choose from {', '.join(INDICES)}, all, or none"
    )


def parse_indices(names: str | Iterable[str]) -> tuple[str, ...]:
    """Canonical names of `--spectral_indices`, in the order given.

    Args:
        names: names (or one comma-separated text), or `all` alone, or `none` alone.

    Raises:
        ConfigError: a name is unknown or given twice.
    """
    parts = [part.strip() for part in (names.split(",") if isinstance(names, str) else names)]
    parts = [part for part in parts if part]
    if [part.lower() for part in parts] == ["all"]:
        return tuple(INDICES)
    if [part.lower() for part in parts] in ([], ["none"]):
        return ()
    parsed = tuple(get_index(part).name for part in parts)
    for name in parsed:
        if parsed.count(name) > 1:
            raise ConfigError(f"spectral index {name} is named twice")
    return parsed


def needed_bands(
    bands: Iterable[str], indices: Iterable[str], settings: IndexSettings
) -> tuple[str, ...]:
    """The bands that a file must hold: those of a network, of its indices, and of their masks."""
    indices = tuple(indices)
    wanted = {*bands, *(band for name in indices for band in get_index(name).bands)}
    if indices:
        wanted |= {"QA"} if settings.mask_using_qa else set()
        wanted |= {"DEM"} if settings.mask_using_water_mask else set()
    return tuple(name for name in BANDS if name in wanted)


def channel_names(bands: Iterable[str], indices: Iterable[str]) -> tuple[str, ...]:
    """Names of the network's input channels, in order: the bands, then the indices."""
    return (*bands, *indices)


def mask_index(
    values: Array, qa: Array, dem: Array, mask_using_qa: bool, mask_using_water_mask: bool
) -> Array:
    """`values` with NaN where QA = 1 and on land (DEM > 0), as the two switches say.

    An unknown DEM (NaN) is not land.
    """
    masked: Any = values
    if mask_using_qa:
        masked = _missing_where(masked, qa == 1)
    if mask_using_water_mask:
        masked = _missing_where(masked, cast("Any", dem) > 0)
    return cast("Array", masked)


def index_planes(
    indices: Iterable[str], bands: Mapping[str, Array], settings: IndexSettings
) -> list[Array]:
    """The index channels of the network: computed, then masked. Bands are never altered.

    Args:
        indices: canonical names (`parse_indices`).
        bands: planes of canonical values (stored integers, metres, NaN = missing) by band name,
            all of one shape; at least those of `needed_bands`.
        settings: index input and masks.

    Returns:
        Planes of that shape; NaN where a band is missing or the denominator is zero, never
        infinite, within `Index.low` and `Index.high` for reflectance.
    """
    ready: dict[str, Array] = {}  # each band is made ready once for all indices
    planes = []
    for index in map(get_index, indices):
        for name in index.bands:
            if name not in ready:
                ready[name] = _ready(name, bands[name], settings.index_input)
        plane = index.evaluate(ready)
        if settings.index_input == "reflectance":
            plane = plane.clip(index.low, index.high)
        if index.masked:
            plane = mask_index(
                plane,
                bands["QA"],
                bands["DEM"],
                settings.mask_using_qa,
                settings.mask_using_water_mask,
            )
        planes.append(plane)
    return planes


def _ready(name: str, values: Any, index_input: IndexInput) -> Any:
    """A band as formulas take it: absurd numbers missing, optical bands as reflectance."""
    values = _missing_where(values, abs(values) > _LARGEST)
    if index_input == "dn" or name not in OPTICAL:
        return values
    return (values * REFLECTANCE_SCALE + REFLECTANCE_OFFSET).clip(*REFLECTANCE_RANGE)
