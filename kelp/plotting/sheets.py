"""Contact sheets: small pictures of a few tiles on one page, to look at while a network learns.

Nothing is resampled: a pixel of a tile is a square of the page's pixels, or a block of a large
tile's pixels is one of the page's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kelp.evaluation.confusion import Confusion, dice, mean_dice
from kelp.plotting import rendering, style
from kelp.plotting.canvas import Canvas
from kelp.plotting.rendering import Picture, ramp
from kelp.plotting.style import INK, QUIET_INK
from kelp.raster.bands import BANDS, MASK_NODATA, OPTICAL, to_reflectance
from kelp.raster.indices import IndexSettings, index_planes
from kelp.raster.streaming import ChannelStats
from kelp.tiling.merge import to_mask

Mask = NDArray[np.uint8]
Plane = NDArray[np.float32]

_RGB, _CIR, _SWIR = ("R", "G", "B"), ("NIR", "R", "G"), ("SWIR", "NIR", "R")
_MARGIN, _GAP, _LABEL, _HEADING, _LINE, _FOOTER, _NARROWEST = 16, 6, 132, 46, 17, 44, 760
_ROWS: Final = 16  # of an input sheet; more continue beside them
_PHOTO_COLORS: Final = 40  # of the sheets of which there are many
_INPUT_COLORS: Final = 96  # with the ramps and letters, a palette is full
_GAMMA: Final = 0.6  # of bands: lifts the dark water, where kelp grows
_LETTERS: Final = 18  # of a name beside pictures


class _Scale(NamedTuple):
    """Of tiles on a page: how many of their pixels, along a side, are how many of the page's."""

    step: int
    times: int

    @classmethod
    def of(cls, tiles: Sequence[SheetTile], largest: int, wanted: int) -> _Scale:
        """At most `largest` of a tile's pixels along a side, about `wanted` of the page's."""
        side = max(max(tile.truth.shape) for tile in tiles)
        step = -(-side // largest)
        return cls(step, max(1, round(wanted / -(-side // step))))

    @property
    def note(self) -> str:
        """What a reader must know of it."""
        return f"1 pixel for {self.step} x {self.step}" if self.step > 1 else ""


@dataclass(frozen=True)
class SheetTile:
    """A tile or image to be pictured."""

    name: str
    """Of the image."""
    place: str
    """Of the tile in it, in words; empty: it is the whole image."""
    pixels: NDArray[np.float32]
    """A canonical array, shape `(7, height, width)`."""
    truth: Mask
    """Shape `(height, width)`: 0, 1, 255 = not known."""
    observed: NDArray[np.bool_]
    """Shape `(height, width)`: where scores look."""

    @property
    def title(self) -> tuple[str, ...]:
        """Lines that name it."""
        return (_short(self.name), self.place) if self.place else (_short(self.name),)


class Row(NamedTuple):
    """Pictures side by side, and what is written before them."""

    label: Sequence[str]
    """Lines; the first is the name."""
    pictures: Sequence[Picture]
    photos: int = 0
    """How many of them, from the first, have any number of colours."""


def error_sheet(
    tiles: Sequence[SheetTile],
    probabilities: Sequence[Plane],
    threshold: float,
    heading: str,
    note: str = "",
) -> bytes:
    """A PNG with a row for each tile: what it shows, the truth, the prediction and its errors.

    Of tiles of more than 192 px blocks of pixels are shown as one: kelp where any of them is, and
    the highest of their probabilities.

    Args:
        tiles: at least one.
        probabilities: of each, shape `(height, width)`.
        threshold: kelp where the probability is at least this.
        heading: printed above.
        note: beside it, in grey.
    """
    scale = _Scale.of(tiles, largest=192, wanted=216)
    rows = [
        _error_row(tile, p, threshold, scale.step)
        for tile, p in zip(tiles, probabilities, strict=True)
    ]
    titles = [("True colour",), ("Colour-infrared",), ("Truth",), ("Probability",), ("Errors",)]
    canvas = _page([rows], titles, scale.times)
    _head(canvas, heading, note, scale.note)
    x, y = _MARGIN, canvas.height - _FOOTER // 2
    for color, words in (
        (style.KELP, "hit"),
        (style.FALSE, "false alarm"),
        (style.MISSED, "miss"),
        (style.NO_KELP, "no kelp"),
        (None, "not observed"),
    ):
        x = canvas.swatch(color, words, y, x)
    canvas.bar(ramp("viridis"), "probability 0", "1", y, x + 12)
    return canvas.png(_PHOTO_COLORS)


def _error_row(tile: SheetTile, probability: Plane, threshold: float, step: int) -> Row:
    seen = np.where(tile.observed, probability, np.nan).astype(np.float32)
    truth = np.where(tile.observed, tile.truth, np.uint8(MASK_NODATA))
    found = to_mask(seen, threshold)
    counts = Confusion.of(truth, found)
    facts = (
        f"{counts.tp + counts.fn:,} px kelp",
        f"{counts.tp + counts.fp:,} px predicted",
        f"dice {mean_dice([dice(*counts[:3])]):.3f}",
    )
    pixels = rendering.shrink_pixels(tile.pixels, step)
    highest = rendering.shrink_highest(seen, step)
    masks = (rendering.shrink_mask(mask, step) for mask in (truth, found))
    pictures = (
        rendering.composite(pixels, _RGB),
        rendering.composite(pixels, _CIR),
        rendering.mask_picture(rendering.shrink_mask(tile.truth, step)),
        rendering.shaded(highest, (0, 1), ramp("viridis")),
        rendering.error_picture(*masks),
    )
    return Row((*tile.title, "", *facts), pictures, photos=2)


def input_sheet(
    tiles: Sequence[SheetTile],
    channels: Sequence[str],
    statistics: Mapping[str, ChannelStats],
    settings: IndexSettings,
    heading: str,
) -> bytes:
    """A PNG with a column for each tile and a row for each thing that a network sees of it.

    Composites; then the network's channels, each between the 1 % and 99 % quantiles of the
    statistics that it is normalised with; then the truth. After 16 rows it continues beside them.

    Args:
        tiles: at least one.
        channels: names of bands and indices.
        statistics: of each channel, in raw units.
        settings: how indices are made.
        heading: printed above.
    """
    scale = _Scale.of(tiles, largest=128, wanted=128)
    rows = input_rows(tiles, channels, statistics, settings, scale.step)
    length = -(-len(rows) // -(-len(rows) // _ROWS))
    blocks = [rows[k : k + length] for k in range(0, len(rows), length)]
    canvas = _page(blocks, [tile.title for tile in tiles], scale.times)
    _head(canvas, heading, scale.note)
    y = canvas.height - _FOOTER // 2
    x = canvas.bar(ramp("gray", gamma=_GAMMA), "bands", "", y, _MARGIN)
    x = canvas.bar(ramp("viridis"), "indices, DEM", "", y, x)
    for color, words in (
        (None, "missing or masked"),
        (style.KELP, "kelp"),
        (style.NO_KELP, "no kelp"),
    ):
        x = canvas.swatch(color, words, y, x)
    return canvas.png(_INPUT_COLORS)


def input_rows(
    tiles: Sequence[SheetTile],
    channels: Sequence[str],
    statistics: Mapping[str, ChannelStats],
    settings: IndexSettings,
    step: int = 1,
) -> list[Row]:
    """The rows of an input sheet; see `input_sheet`. Blocks of `step` pixels are shown as one."""
    small = [rendering.shrink_pixels(tile.pixels, step) for tile in tiles]
    named = (("True colour", _RGB), ("Colour-infrared", _CIR), ("SWIR composite", _SWIR))
    rows = [
        Row((name, ", ".join(bands)), [rendering.composite(x, bands) for x in small], len(tiles))
        for name, bands in named
    ]
    planes = [_planes(tile.pixels, channels, settings) for tile in tiles]
    for name in channels:
        shrunk = [rendering.shrink_plane(each[name], step) for each in planes]
        rows.append(_channel_row(name, shrunk, statistics[name]))
    truths = [rendering.shrink_mask(tile.truth, step) for tile in tiles]
    rows.append(Row(("Truth",), [rendering.mask_picture(truth) for truth in truths]))
    return rows


def _planes(
    pixels: NDArray[np.float32], channels: Sequence[str], settings: IndexSettings
) -> dict[str, Plane]:
    """The channels of a tile in raw units, before what is missing is filled."""
    planes: dict[str, Plane] = dict(zip(BANDS, pixels, strict=True))
    indices = [name for name in channels if name not in BANDS]
    with np.errstate(all="ignore"):
        made = index_planes(indices, planes, settings)
    return planes | dict(zip(indices, made, strict=True))


def _channel_row(name: str, planes: Sequence[Plane], stats: ChannelStats) -> Row:
    limits = stats.q01, stats.q99
    colors = ramp("gray", gamma=_GAMMA) if name in (*OPTICAL, "QA") else ramp("viridis")
    pictures = [rendering.shaded(plane, limits, colors) for plane in planes]
    if name == "QA":
        return Row((name, "white: cloud or bad"), pictures)
    if name in OPTICAL:
        low, high = to_reflectance(np.array(limits, dtype=np.float32)).round(3) + 0.0  # no -0
        return Row((name, f"{low:.3f} to {high:.3f}", "reflectance"), pictures)
    if name in ("DEM", "DEMWM"):
        return Row((name, f"{limits[0]:.0f} to {limits[1]:.0f} m"), pictures)
    return Row((name, f"{limits[0]:.3g} to {limits[1]:.3g}"), pictures)


def _page(blocks: Sequence[Sequence[Row]], titles: Sequence[Sequence[str]], times: int) -> Canvas:
    """Rows of pictures with their labels, below titles; blocks of rows lie side by side."""
    pictures = [picture for rows in blocks for row in rows for picture in row.pictures]
    height, width = (times * max(picture.shape[k] for picture in pictures) for k in range(2))
    lines = max(len(row.label) for rows in blocks for row in rows)
    height_of_row = max(height, lines * _LINE) + _GAP
    top = _HEADING + _LINE * max(len(title) for title in titles) + _GAP
    block = _LABEL + len(titles) * (width + _GAP) + _MARGIN
    canvas = Canvas(
        top + max(len(rows) for rows in blocks) * height_of_row + _FOOTER,
        max(_MARGIN + len(blocks) * block, _NARROWEST),
    )
    for number, rows in enumerate(blocks):
        left = _MARGIN + number * block
        columns = [left + _LABEL + k * (width + _GAP) for k in range(len(titles))]
        for x, title in zip(columns, titles, strict=True):
            _stack(canvas, title, _HEADING, x)
        for k, row in enumerate(rows):
            y = top + k * height_of_row
            _stack(canvas, row.label, y, left)
            for n, (x, picture) in enumerate(zip(columns, row.pictures, strict=True)):
                canvas.paste(picture, y, x, times, photo=n < row.photos)
    return canvas


def _stack(canvas: Canvas, lines: Sequence[str], y: int, x: int) -> None:
    """Lines of text one below the other, the first of them a name."""
    for k, line in enumerate(lines):
        name = k == 0
        where = y + _LINE // 2 + k * _LINE
        canvas.words(line, where, x, 12 if name else 11, name, INK if name else QUIET_INK)


def _head(canvas: Canvas, heading: str, *notes: str) -> None:
    canvas.words(heading, _HEADING // 2, _MARGIN, 17, bold=True)
    note = "; ".join(note for note in notes if note)
    canvas.words(note, _HEADING // 2, canvas.width - _MARGIN, 12, ink=QUIET_INK, side="right")


def _short(name: str) -> str:
    """A name that fits beside pictures; of a long one the beginning and the end."""
    if len(name) <= _LETTERS:
        return name
    half = (_LETTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
