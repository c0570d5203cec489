"""The pictures of `howto/slicing.md`, made by kelp's own grid, strip and merger.

    python docs/figures.py    # writes docs/assets/slicing_*.png

No part of the site's build: run it after a change of what it shows, and look at the pictures.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from kelp.raster.bands import BANDS, DEM
from kelp.raster.validity import canonical
from kelp.raster.window import Shape, Tile
from kelp.simulation.scene import simulate_scene
from kelp.tiling.grid import TileGrid
from kelp.tiling.merge import Blend, StripMerger, window
from kelp.tiling.strip import Pixels, Slicing, Strip

matplotlib.use("Agg")

ASSETS: Final = Path(__file__).parent / "assets"
BLUE, ORANGE, GREY, GREEN, SAND = "#20639b", "#d9621e", "#8a8a8a", "#2a8c5a", "#d8c9a3"
TILE, OVERLAP, SIDE = 128, 64, 350


def outline(axes: Axes, tile: Tile, color: str, **style: Any) -> None:
    """The rim of a tile, in pixels of the scene."""
    axes.add_patch(
        Rectangle((tile.x, tile.y), tile.width, tile.height, fill=False, edgecolor=color, **style)
    )


def without_ticks(axes: Axes, title: str) -> None:
    """A panel that is a picture."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def grid_figure() -> Figure:
    """25 tiles that end at the edge, beside one tile begun at every stride."""
    figure = Figure(figsize=(8.6, 4.7), layout="constrained")
    moved = list(TileGrid((SIDE, SIDE), TILE, OVERLAP))
    starts = range(0, SIDE, TILE - OVERLAP)
    padded = [Tile(y, x, TILE, TILE) for y in starts for x in starts]
    for axes, tiles, title in (
        (figure.add_subplot(1, 2, 1), moved, "kelp: the last ones are moved back"),
        (figure.add_subplot(1, 2, 2), padded, "padded: a tile at every stride"),
    ):
        axes.add_patch(Rectangle((0, 0), 448, 448, facecolor="#ececec", hatch="///", ec="#cfcfcf"))
        axes.add_patch(Rectangle((0, 0), SIDE, SIDE, facecolor="#dcebf5", edgecolor="black"))
        for tile in tiles:
            inside = tile.clipped((SIDE, SIDE))
            whole = (inside.height, inside.width) == (TILE, TILE)
            color = BLUE if whole else ORANGE
            axes.plot(tile.x + TILE / 2, tile.y + TILE / 2, "o", color=color, ms=5)
        outline(axes, tiles[0], BLUE, lw=2)
        outline(axes, tiles[1], BLUE, lw=1.5, ls="--")
        outline(axes, tiles[-1], BLUE if tiles is moved else ORANGE, lw=2)
        real = sum(c.height * c.width for c in (t.clipped((SIDE, SIDE)) for t in tiles))
        share = 1 - real / (len(tiles) * TILE**2)
        axes.set(xlim=(-6, 454), ylim=(454, -6), aspect="equal")
        without_ticks(axes, f"{title}\n{len(tiles)} tiles, {share:.0%} of their pixels invented")
    figure.supxlabel(
        f"scene {SIDE} x {SIDE} px, tile {TILE}, overlap {OVERLAP}; dots: centres of tiles; "
        "dashed: second tile; hatched: no data",
        fontsize=9,
    )
    return figure


def merged_row(blend: Blend, validity: float) -> np.ndarray:
    """Two tiles, one saying 0.9, one 0.3, as the merger gives them: one row of pixels."""
    shape = (TILE, TILE + OVERLAP)
    merger = StripMerger(shape, blend)
    for tile, value, share in zip(
        TileGrid(shape, TILE, OVERLAP), (0.9, 0.3), (1.0, validity), strict=True
    ):
        merger.add(tile, np.full((TILE, TILE), value, np.float32), share)
    return merger.take(TILE)[TILE // 2]


def votes_figure() -> Figure:
    """Windows, and what they and validity make of two tiles that disagree."""
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.8, 1))
    seen = np.ones((TILE, TILE))
    y, x = np.mgrid[:TILE, :TILE]
    for row, column, radius in ((30, 84, 34), (22, 44, 22), (52, 112, 26), (64, 70, 20)):
        seen[(y - row) ** 2 + (x - column) ** 2 < radius**2] = 0  # a cloud
    planes = (
        ("window mean", window("mean", TILE, TILE), "viridis"),
        ("window hann", window("hann", TILE, TILE), "viridis"),
        (f"observed: validity {seen.mean():.2f}", seen, "gray"),
        (f"weight: hann x {seen.mean():.2f}", window("hann", TILE, TILE) * seen.mean(), "viridis"),
    )
    axes_of_windows = top.subplots(1, 4)
    for axes, (title, plane, colors) in zip(axes_of_windows, planes, strict=True):
        shown = axes.imshow(plane, cmap=colors, vmin=0, vmax=1)
        without_ticks(axes, title)
    top.colorbar(shown, ax=axes_of_windows, shrink=0.75, label="weight of the vote")
    for axes, validity in zip(bottom.subplots(1, 2, sharey=True), (1.0, 0.25), strict=True):
        axes.axvspan(OVERLAP, TILE, color="#eeeeee")
        axes.plot([0, TILE], [0.9, 0.9], color=GREY, ls=":", lw=1.5)
        axes.plot([OVERLAP, TILE + OVERLAP], [0.3, 0.3], color=GREY, ls=":", lw=1.5)
        axes.plot(merged_row("mean", validity), color=ORANGE, lw=2, label="mean")
        axes.plot(merged_row("hann", validity), color=BLUE, lw=2, label="hann")
        axes.text(4, 0.94, "left tile says 0.9, validity 1", fontsize=8.5)
        axes.text(
            TILE + OVERLAP - 4,
            0.22,
            f"right tile says 0.3, validity {validity:g}",
            fontsize=8.5,
            ha="right",
        )
        axes.set(ylim=(0.1, 1.05), xlim=(0, TILE + OVERLAP), xlabel="column, px")
        axes.set_title("both observed" if validity == 1 else "the right one mostly cloud", size=10)
        axes.legend(loc="lower left", title="merged with", fontsize=8.5, title_fontsize=8.5)
    bottom.axes[0].set_ylabel("probability")
    return figure


def peak_of_merging(height: int, width: int) -> float:
    """Most MB that a merger holds while tiles of a scene come and rows leave."""
    tracemalloc.start()
    grid, merger = TileGrid((height, width), TILE, OVERLAP), StripMerger((height, width))
    values = np.full((TILE, TILE), 0.5, np.float32)
    for y, following in zip(grid.rows, (*grid.rows[1:], height), strict=True):
        for tile in grid.row(y):
            merger.add(tile, values)
        merger.take(following)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return peak


def draw_strip(axes: Axes) -> None:
    """Where rows of a scene are while the fourth row of tiles is under way."""
    height, width, row = 640, 448, 4
    grid = TileGrid((height, width), TILE, OVERLAP)
    y, following = grid.rows[row], grid.rows[row + 1]
    bands = (
        (0, y, "#cfe5d6", "finished: written, no longer in memory"),
        (y, following, "#bcd6ea", "leave after this row of tiles"),
        (following, y + TILE, "#dcebf5", "wait for the next row of tiles"),
        (y + TILE, y + TILE + TILE - OVERLAP, "#f6d9c4", "being read ahead"),
        (y + TILE + TILE - OVERLAP, height, "#f2f2f2", "not yet read"),
    )
    for first, end, color, text in bands:
        axes.add_patch(Rectangle((0, first), width, end - first, facecolor=color, lw=0))
        left = TILE if y <= first < y + TILE else 0  # beside the tile that is drawn
        middle = (left + width) / 2, (first + end) / 2
        axes.text(*middle, text, ha="center", va="center", fontsize=8.5)
    outline(axes, Tile(y, 0, TILE, width), BLUE, lw=2)
    outline(axes, grid.row(y)[0], BLUE, lw=1)
    axes.text(TILE / 2, y + TILE / 2, "tile", ha="center", va="center", fontsize=8.5, color=BLUE)
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor="black"))
    axes.add_patch(
        FancyArrowPatch(
            (width + 25, y),
            (width + 25, y + TILE + 80),
            arrowstyle="-|>",
            mutation_scale=14,
            color=BLUE,
        )
    )
    axes.set(xlim=(-6, width + 45), ylim=(height + 6, -6), aspect="equal")
    axes.spines[:].set_visible(False)
    without_ticks(axes, "a strip moves down the scene")


def draw_threads(axes: Axes) -> None:
    """Batches in the three threads: a sketch, not a measurement."""
    # While one batch is in the network the next two are read, or wait.
    reading = np.array([0, 0.45, 0.9, 1.5, 2.5, 3.5])
    lanes = (
        ("read", reading, 0.4, SAND),
        ("network", 0.5 + np.arange(6), 0.96, BLUE),
        ("merge,\nwrite", 1.5 + np.arange(6), 0.3, GREEN),
    )
    for lane, (_, starts, length, color) in enumerate(lanes):
        for number, start in enumerate(starts, 1):
            axes.add_patch(Rectangle((start, lane - 0.32), length, 0.64, facecolor=color))
            axes.text(
                start + length / 2,
                lane,
                str(number),
                ha="center",
                va="center",
                fontsize=8.5,
                color="black" if color == SAND else "white",
            )
    axes.set(xlim=(-0.1, 6.9), ylim=(2.6, -0.6), xticks=[], xlabel="time (a sketch)")
    axes.set_yticks(range(3), [name for name, *_ in lanes], fontsize=9)
    axes.set_title("three threads, numbered batches", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def strip_figure() -> Figure:
    """A strip that moves down, the threads that move it, and the memory of merging."""
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    places = figure.add_gridspec(2, 2, width_ratios=(1, 1.05))
    draw_strip(figure.add_subplot(places[:, 0]))
    draw_threads(figure.add_subplot(places[0, 1]))
    axes = figure.add_subplot(places[1, 1])
    heights = [500, 1000, 2000, 4000]
    for width, color in ((2000, BLUE), (1000, ORANGE)):
        peaks = [peak_of_merging(height, width) for height in heights]
        axes.plot(heights, peaks, "o-", color=color, label=f"{width:,} px wide")
    axes.set(ylim=(0, None), xlabel="height of the scene, px", ylabel="MB")
    axes.set_title("peak memory of merging, measured", fontsize=10)
    axes.legend(fontsize=8.5, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


class ArraySource:
    """A canonical array as a source of the engine."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self.shape: Shape = (pixels.shape[1], pixels.shape[2])

    def read(self, tile: Tile, /) -> Pixels:
        """A window of it."""
        rows, columns = tile.slices
        return self._pixels[:, rows, columns]


def fates(pixels: Pixels, slicing: Slicing) -> list[tuple[Tile, str]]:
    """What the strip says of each tile: run, land, or unobserved."""
    source = ArraySource(pixels)
    strip = Strip(source, slicing)
    grid = TileGrid(source.shape, slicing.tile, slicing.overlap)
    told = []
    for y in grid.rows:
        strip.advance(y)
        for tile in grid.row(y):
            seen = strip.validity(tile) > 0
            fate = "land" if strip.is_land(tile) else "run"
            told.append((tile, fate if seen else "unobserved"))
    return told


def left_out_figure() -> Figure:
    """Tiles of a simulated coast that are run, and those that are not."""
    shape, tile, overlap = (420, 600), 64, 32
    pixels = canonical(simulate_scene(1, *shape).pixels, BANDS)
    y, x = np.mgrid[: shape[0], : shape[1]]
    pixels[:, y + 0.55 * x < 150] = np.nan  # outside the satellite's path
    slicing = Slicing((tile, tile), (overlap, overlap), skip_land=True)
    told = fates(pixels, slicing)
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    wide, near = figure.subplots(1, 2, width_ratios=(1.75, 1))
    picture = np.full((*shape, 3), (0.78, 0.88, 0.95))
    picture[pixels[DEM] > 0] = (0.85, 0.79, 0.64)
    picture[np.isnan(pixels[:5]).all(axis=0)] = (0.25, 0.25, 0.25)
    styles = {"run": ("o", BLUE), "land": ("x", ORANGE), "unobserved": ("x", "white")}
    for axes in (wide, near):
        axes.imshow(picture)
    for fate, (marker, color) in styles.items():
        centres = [(t.x + tile / 2, t.y + tile / 2) for t, f in told if f == fate]
        wide.plot(*zip(*centres, strict=True), marker, color=color, ms=5, mew=1.6, ls="")
    counts = {fate: sum(f == fate for _, f in told) for fate in styles}
    without_ticks(
        wide,
        f"{len(told)} tiles: {counts['run']} run (dots), {counts['land']} all land (orange), "
        f"{counts['unobserved']} without data (white)",
    )
    without_ticks(near, draw_tolerance(near, pixels, slicing))
    return figure


def draw_tolerance(axes: Axes, pixels: Pixels, slicing: Slicing) -> str:
    """Zoom to a tile that is all land, but with water within the tolerance; what it says."""
    wet = ~(pixels[DEM] > 0)
    for tile, fate in fates(pixels, slicing):
        if fate == "run" and not wet[tile.slices].any():
            break
    margin = slicing.land_tolerance
    outline(axes, tile, BLUE, lw=2)
    wider = Tile(tile.y - margin, tile.x - margin, tile.height + 6, tile.width + 6)
    outline(axes, wider, ORANGE, lw=1.5, ls="--")
    rows, columns = np.nonzero(wet[wider.slices])
    axes.plot(columns + wider.x, rows + wider.y, "s", color=ORANGE, ms=3)
    axes.set(xlim=(tile.x - 14, tile.right + 14), ylim=(tile.bottom + 14, tile.y - 14))
    return f"all land, but water within {margin} px\n(dashed): this tile is run"


FIGURES: Final[dict[str, Callable[[], Figure]]] = {
    "slicing_grid": grid_figure,
    "slicing_votes": votes_figure,
    "slicing_strip": strip_figure,
    "slicing_left_out": left_out_figure,
}


def main() -> None:
    """Write all pictures."""
    for name, make in FIGURES.items():
        make().savefig(ASSETS / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
