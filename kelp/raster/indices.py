"""Spectral indices as data: one formula each, over numpy arrays and torch tensors alike.

`kelp stats` (numpy) and the network's preprocessing (torch) call the same functions, so that
statistics and training cannot disagree. Formulas use operators only; what differs between the
two libraries is in `_missing_where`, and torch is never imported here.

`index_input="dn"`, the default of networks, puts the stored integers into the formulas as they
are. Their offset of 0.2 does not cancel in a ratio, so values are not the published ones; but no
denominator comes near zero over dark water, and networks score better (docs/experiments.md).
`"reflectance"` is what the definitions are published for. Over dark water it is near zero or
below: so it is clipped to `REFLECTANCE_RANGE` first, and the index to its own range last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
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
    """One spectral index."""

    name: str
    """Short name, as `--spectral_indices` takes it."""
    long_name: str
    """Name in full."""
    bands: tuple[str, ...]
    """Bands, in the order of the formula's arguments."""
    formula: Callable[..., Any]
    """Operators over planes of equal shape."""
    low: float
    """Least value with reflectance; smaller ones are clipped to it."""
    high: float
    """Greatest value with reflectance. Where the definition has no bound: a bound of ours, beyond
    what land, water and vegetation reach, that keeps near-zero denominators from exploding."""
    source: str
    """Where the formula is published."""
    masked: bool = True
    """Whether `--mask_using_qa` and `--mask_using_water_mask` apply."""


def _missing_where(values: Any, condition: Any) -> Any:
    """`values` with NaN where `condition` holds."""
    if hasattr(values, "masked_fill"):  # a torch tensor
        return values.masked_fill(condition, float("nan"))
    return np.where(condition, np.nan, values)


def ratio(numerator: Any, denominator: Any) -> Any:
    """Quotient that is missing (NaN), never infinite, where the denominator is zero."""
    return numerator / _missing_where(denominator, abs(denominator) < _ZERO)


def _atsavi(nir: Any, red: Any) -> Any:
    slope, intercept, adjustment = 1.22, 0.03, 0.08  # soil line and factor of the source
    return ratio(
        slope * (nir - slope * red - intercept),
        slope * nir + red - slope * intercept + adjustment * (1 + slope**2),
    )


_IDB: Final = "indexdatabase.de"

_ALL: Final = (
    # Not masked: it is the land mask itself, and would be 0 everywhere.
    Index(
        "DEMWM",
        "Elevation above the sea (metres), 0 on water",
        ("DEM",),
        lambda dem: dem.clip(min=0),
        0,
        9000,
        "Kelp Wanted competition, 2nd place (2024)",
        masked=False,
    ),
    Index(
        "NDVI",
        "Normalized Difference Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(n - r, n + r),
        -1,
        1,
        "Rouse et al. 1974, ntrs.nasa.gov/citations/19740022614",
    ),
    Index(
        "ATSAVI",
        "Adjusted Transformed Soil-Adjusted Vegetation Index",
        ("NIR", "R"),
        _atsavi,
        -1,
        1,
        "Baret & Guyot 1991, doi:10.1016/0034-4257(91)90009-U",
    ),
    Index(
        "AVI",
        "Ashburn Vegetation Index",
        ("NIR", "R"),
        lambda n, r: 2 * n - r,
        -1,
        2,
        "Ashburn 1979, ntrs.nasa.gov/citations/19800007243",
    ),
    Index(
        "CI",
        "Coloration Index",
        ("R", "B"),
        lambda r, b: ratio(r - b, r),
        -10,
        1,
        f"{_IDB}, Coloration Index",
    ),
    Index(
        "ClGreen",
        "Chlorophyll Index Green",
        ("NIR", "G"),
        lambda n, g: ratio(n, g) - 1,
        -1,
        20,
        "Gitelson et al. 2003, doi:10.1078/0176-1617-00887",
    ),
    Index(
        "GBNDVI",
        "Green-Blue Normalized Difference Vegetation Index",
        ("NIR", "G", "B"),
        lambda n, g, b: ratio(n - (g + b), n + (g + b)),
        -1,
        1,
        "Wang et al. 2007, doi:10.1016/S1672-6308(07)60027-4",
    ),
    Index(
        "GVMI",
        "Global Vegetation Moisture Index",
        ("NIR", "SWIR"),
        lambda n, s: ratio((n + 0.1) - (s + 0.02), (n + 0.1) + (s + 0.02)),
        -1,
        1,
        "Ceccato et al. 2002, doi:10.1016/S0034-4257(02)00037-8",
    ),
    Index(
        "IPVI",
        "Infrared Percentage Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(n, n + r),
        0,
        1,
        "Crippen 1990, doi:10.1016/0034-4257(90)90085-Z",
    ),
    Index(
        "KIVU",
        "Lake Kivu chlorophyll index",
        ("R", "G", "B"),
        lambda r, g, b: ratio(b - r, g),
        -10,
        10,
        "Boucher et al. 2018, doi:10.1002/eap.1708, after Brivio et al. 2001",
    ),
    # Published with the red edge (700 nm), which Landsat lacks: NIR takes its place.
    Index(
        "MCARI",
        "Modified Chlorophyll Absorption in Reflectance Index",
        ("NIR", "R", "G"),
        lambda n, r, g: ((n - r) - 0.2 * (n - g)) * ratio(n, r),
        -10,
        20,
        "Daughtry et al. 2000, doi:10.1016/S0034-4257(00)00113-9",
    ),
    Index(
        "MVI",
        "Mid-infrared Vegetation Index",
        ("NIR", "SWIR"),
        lambda n, s: ratio(n, s),
        0,
        20,
        f"{_IDB}, Mid-infrared vegetation index",
    ),
    Index(
        "NormNIR",
        "Normalized NIR",
        ("NIR", "R", "G"),
        lambda n, r, g: ratio(n, n + r + g),
        0,
        1,
        "Sripada et al. 2005, doi:10.2134/agronj2004.0314",
    ),
    Index(
        "PNDVI",
        "Pan Normalized Difference Vegetation Index",
        ("NIR", "R", "G", "B"),
        lambda n, r, g, b: ratio(n - (r + g + b), n + (r + g + b)),
        -1,
        1,
        "Wang et al. 2007, doi:10.1016/S1672-6308(07)60027-4",
    ),
    Index(
        "SABI",
        "Surface Algal Bloom Index",
        ("NIR", "R", "G", "B"),
        lambda n, r, g, b: ratio(n - r, g + b),
        -10,
        10,
        "Alawadi 2010, doi:10.1117/12.862096",
    ),
    Index(
        "WDRVI",
        "Wide Dynamic Range Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(0.1 * n - r, 0.1 * n + r),
        -1,
        1,
        "Gitelson 2004, doi:10.1078/0176-1617-01176",
    ),
    Index(
        "mCRIG",
        "Modified Carotenoid Reflectance Index, Green",
        ("NIR", "G", "B"),
        lambda n, g, b: ratio(n, b) - ratio(n, g),
        -20,
        20,
        "Gitelson et al. 2006, doi:10.1029/2006GL026457",
    ),
    # Beyond the seventeen. Left out: indices whose denominator passes through zero on ordinary
    # surfaces (EVI, ARVI, GARI, VARI), and those that take roots of differences.
    Index(
        "FAI",
        "Floating Algae Index",
        ("SWIR", "NIR", "R"),
        lambda s, n, r: n - (r + 0.22 * (s - r)),
        -1,
        1,  # 865, 655, 1610 nm
        "Hu 2009, doi:10.1016/j.rse.2009.05.012",
    ),
    Index(
        "NDWI",
        "Normalized Difference Water Index",
        ("G", "NIR"),
        lambda g, n: ratio(g - n, g + n),
        -1,
        1,
        "McFeeters 1996, doi:10.1080/01431169608948714",
    ),
    Index(
        "MNDWI",
        "Modified Normalized Difference Water Index",
        ("G", "SWIR"),
        lambda g, s: ratio(g - s, g + s),
        -1,
        1,
        "Xu 2006, doi:10.1080/01431160600589179",
    ),
    Index(
        "NDMI",
        "Normalized Difference Moisture Index",
        ("NIR", "SWIR"),
        lambda n, s: ratio(n - s, n + s),
        -1,
        1,
        "Wilson & Sader 2002, doi:10.1016/S0034-4257(01)00318-2",
    ),
    Index(
        "NDTI",
        "Normalized Difference Turbidity Index",
        ("R", "G"),
        lambda r, g: ratio(r - g, r + g),
        -1,
        1,
        "Lacaux et al. 2007, doi:10.1016/j.rse.2006.07.012",
    ),
    Index(
        "GNDVI",
        "Green Normalized Difference Vegetation Index",
        ("NIR", "G"),
        lambda n, g: ratio(n - g, n + g),
        -1,
        1,
        "Gitelson et al. 1996, doi:10.1016/S0034-4257(96)00072-7",
    ),
    Index(
        "BNDVI",
        "Blue Normalized Difference Vegetation Index",
        ("NIR", "B"),
        lambda n, b: ratio(n - b, n + b),
        -1,
        1,
        "Wang et al. 2007, doi:10.1016/S1672-6308(07)60027-4",
    ),
    Index(
        "GRNDVI",
        "Green-Red Normalized Difference Vegetation Index",
        ("NIR", "G", "R"),
        lambda n, g, r: ratio(n - (g + r), n + (g + r)),
        -1,
        1,
        "Wang et al. 2007, doi:10.1016/S1672-6308(07)60027-4",
    ),
    Index(
        "RBNDVI",
        "Red-Blue Normalized Difference Vegetation Index",
        ("NIR", "R", "B"),
        lambda n, r, b: ratio(n - (r + b), n + (r + b)),
        -1,
        1,
        "Wang et al. 2007, doi:10.1016/S1672-6308(07)60027-4",
    ),
    Index(
        "EVI2",
        "Two-Band Enhanced Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(2.5 * (n - r), n + 2.4 * r + 1),
        -1,
        2.5,
        "Jiang et al. 2008, doi:10.1016/j.rse.2008.06.006",
    ),
    Index(
        "SAVI",
        "Soil-Adjusted Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(1.5 * (n - r), n + r + 0.5),
        -1.5,
        1.5,
        "Huete 1988, doi:10.1016/0034-4257(88)90106-X",
    ),
    Index(
        "OSAVI",
        "Optimized Soil-Adjusted Vegetation Index",
        ("NIR", "R"),
        lambda n, r: ratio(n - r, n + r + 0.16),
        -1,
        1,
        "Rondeaux et al. 1996, doi:10.1016/0034-4257(95)00186-7",
    ),
    Index(
        "AFRI1600",
        "Aerosol Free Vegetation Index (1600 nm)",
        ("NIR", "SWIR"),
        lambda n, s: ratio(n - 0.66 * s, n + 0.66 * s),
        -1,
        1,
        "Karnieli et al. 2001, doi:10.1016/S0034-4257(01)00190-0",
    ),
    Index(
        "BWDRVI",
        "Blue Wide Dynamic Range Vegetation Index",
        ("NIR", "B"),
        lambda n, b: ratio(0.1 * n - b, 0.1 * n + b),
        -1,
        1,
        "Hancock & Dougherty 2007, doi:10.2135/cropsci2007.01.0031",
    ),
    Index(
        "CVI",
        "Chlorophyll Vegetation Index",
        ("NIR", "R", "G"),
        lambda n, r, g: ratio(n, g) * ratio(r, g),
        0,
        20,
        "Vincini & Frazzi 2011, doi:10.1007/s11119-010-9204-3",
    ),
    Index(
        "GLI",
        "Green Leaf Index",
        ("R", "G", "B"),
        lambda r, g, b: ratio(2 * g - r - b, 2 * g + r + b),
        -1,
        1,
        "Louhaichi et al. 2001, doi:10.1080/10106040108542184",
    ),
    Index(
        "SR",
        "Simple Ratio",
        ("NIR", "R"),
        lambda n, r: ratio(n, r),
        0,
        20,
        "Jordan 1969, doi:10.2307/1936256",
    ),
    Index(
        "DVI",
        "Difference Vegetation Index",
        ("NIR", "R"),
        lambda n, r: n - r,
        -1,
        1,
        "Roujean & Breon 1995, doi:10.1016/0034-4257(94)00114-3",
    ),
    Index(
        "FCVI",
        "Fluorescence Correction Vegetation Index",
        ("NIR", "R", "G", "B"),
        lambda n, r, g, b: n - (r + g + b) / 3,
        -1,
        1,
        "Yang et al. 2020, doi:10.1016/j.rse.2020.111676",
    ),
    Index(
        "NIRv",
        "Near-Infrared Reflectance of Vegetation",
        ("NIR", "R"),
        lambda n, r: n * ratio(n - r, n + r),
        -1,
        1,
        "Badgley et al. 2017, doi:10.1126/sciadv.1602244",
    ),
    Index(
        "NormR",
        "Normalized Red",
        ("NIR", "R", "G"),
        lambda n, r, g: ratio(r, n + r + g),
        0,
        1,
        "Sripada et al. 2005, doi:10.2134/agronj2004.0314",
    ),
    Index(
        "NormG",
        "Normalized Green",
        ("NIR", "R", "G"),
        lambda n, r, g: ratio(g, n + r + g),
        0,
        1,
        "Sripada et al. 2005, doi:10.2134/agronj2004.0314",
    ),
    Index(
        "GCC",
        "Green Chromatic Coordinate",
        ("R", "G", "B"),
        lambda r, g, b: ratio(g, r + g + b),
        0,
        1,
        "Gillespie et al. 1987, doi:10.1016/0034-4257(87)90088-5",
    ),
)

INDICES: Final[Mapping[str, Index]] = {index.name: index for index in _ALL}
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


def compute(
    index: Index | str, bands: Mapping[str, Array], index_input: IndexInput = "reflectance"
) -> Array:
    """One index over whole planes, without masks.

    Args:
        index: the index or its name.
        bands: planes of canonical values (stored integers, metres, NaN = missing) by band name,
            all of one shape; at least those that the index needs.
        index_input: see the module's docstring.

    Returns:
        A plane of that shape; NaN where a band is missing or the denominator is zero, never
        infinite, within `index.low` and `index.high` for reflectance.

    Raises:
        ConfigError: the index is unknown or its bands are not all given.
    """
    index = get_index(index) if isinstance(index, str) else index
    absent = [name for name in index.bands if name not in bands]
    if absent:
        raise ConfigError(f"spectral index {index.name} needs the band {', '.join(absent)}")
    ready = {name: _ready(name, bands[name], index_input) for name in index.bands}
    values: Array = _evaluate(index, ready, index_input)
    return values


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
        bands: planes by band name as in `compute`, with QA and DEM where a mask is on.
        settings: index input and masks.
    """
    ready: dict[str, Array] = {}  # each band is made ready once for all indices
    planes = []
    for index in map(get_index, indices):
        for name in index.bands:
            if name not in ready:
                ready[name] = _ready(name, bands[name], settings.index_input)
        plane = _evaluate(index, ready, settings.index_input)
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


def _evaluate(index: Index, ready: Mapping[str, Any], index_input: IndexInput) -> Any:
    values = index.formula(*(ready[name] for name in index.bands))
    return values.clip(index.low, index.high) if index_input == "reflectance" else values
