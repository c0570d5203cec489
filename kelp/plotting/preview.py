"""Pictures of scenes, their masks and predictions: `kelp preview`, training samples, reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kelp.config.predict import PreviewConfig
from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.io.files import output_folder, write_bytes
from kelp.io.location import Url
from kelp.plotting import rendering, style
from kelp.plotting.rendering import Picture
from kelp.plotting.style import Color
from kelp.progress import Progress, silent
from kelp.raster.bands import MASK_NODATA
from kelp.raster.georeference import Grid, require_same_grid
from kelp.raster.masks import read_mask
from kelp.raster.window import Tile
from kelp.sensors import find_scenes, open_scene, scene_name
from kelp.tables import output_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mask = NDArray[np.uint8]

LARGEST_SIDE: Final = 1024
"""Scenes with a longer side are shown smaller, several pixels as one."""

STRIP_ROWS: Final = 256
"""Rows of the picture that are read at a time."""
_LEAST_DPI: Final = 125
# Inches: a panel's width, its caption, and what stands above and below all panels.
_PANEL_INCHES, _CAPTION, _HEADING, _LEGEND = 3.9, 0.4, 0.4, 0.5
_MARGIN: Final = 0.012  # of the picture's width


@dataclass(frozen=True)
class PreviewResult:
    """The pictures that were written."""

    pictures: tuple[Path, ...]

    def summary(self) -> str:
        """One line for the terminal."""
        n = len(self.pictures)
        return f"wrote {n} picture{'' if n == 1 else 's'} into {self.pictures[0].parent}"


def preview(config: PreviewConfig, progress: Progress = silent) -> PreviewResult:
    """Picture the first scenes that have a predicted mask, in the order of their names.

    Raises:
        InputError: no scene has a mask, a file is unreadable, or grids differ.
    """
    scenes = find_scenes(config.data_dir)
    folder = output_folder(config.output_dir)
    pictures = write_previews(
        scenes,
        config.predictions_dir,
        folder,
        config.first_n,
        config.band_order,
        progress,
        config.ignore_georeference,
    )
    config.record(folder)
    return PreviewResult(tuple(pictures))


def write_previews(
    scenes: Sequence[Path | Url],
    predictions_dir: Path,
    output_dir: Path,
    first_n: int,
    band_order: Sequence[str] = (),
    progress: Progress = silent,
    ignore_georeference: bool = False,
) -> list[Path]:
    """Write `<tile_id>.png` for the first `first_n` of `scenes` that have a mask; give the paths.

    Raises `InputError` when none has one.
    """
    pairs = [(scene, predictions_dir / output_name(scene)) for scene in scenes]
    shown = [(scene, mask) for scene, mask in pairs if mask.is_file()][:first_n]
    if not shown:
        raise InputError(
            f"{predictions_dir}: holds no mask of the scenes "
            f"(such as {output_name(scenes[0]) if scenes else '<name>_kelp.tif'}); predict them"
        )
    pictures = []
    for done, (scene, mask) in enumerate(shown, 1):
        picture = output_dir / f"{scene_name(scene)}.png"
        content = picture_of(
            scene, mask, band_order=band_order, ignore_georeference=ignore_georeference
        )
        write_bytes(picture, content)
        pictures.append(picture)
        progress("previews", done, len(shown))
    return pictures


def picture_of(
    scene: Path | Url,
    prediction: Path | None = None,
    truth: Path | None = None,
    band_order: Sequence[str] = (),
    kelp_value: int = 1,
    ignore_georeference: bool = False,
) -> bytes:
    """A PNG of a scene and its masks, read in strips: a huge scene needs little memory.

    `kelp_value` is that of the truth. Raises `InputError` where the grids differ.
    """
    with open_scene(scene, SceneOptions(band_order=tuple(band_order))) as source:
        shape = source.shape
        grid = Grid(shape, source.georeference)
        for path in (truth, prediction):
            if path is not None:
                require_same_grid(scene, path, ignore_georeference, grid)
        step = _step(shape)
        strips = list(Tile(0, 0, *shape).strips(STRIP_ROWS * step))
        pixels = np.concatenate(
            [rendering.shrink_pixels(source.read(strip), step) for strip in strips], axis=1
        )

    def shown(path: Path | None, value: int = 1) -> _Shown | None:
        if path is None:
            return None
        return _Shown.of((read_mask(path, strip, value) for strip in strips), step)

    return _draw(pixels, shown(truth, kelp_value), shown(prediction), scene_name(scene), step)


def panels(
    pixels: NDArray[np.float32],
    truth: Mask | None = None,
    prediction: Mask | None = None,
    title: str = "",
) -> bytes:
    """A PNG of one scene: true colour, SWIR false colour, NDVI, and what there is of masks.

    Reflectance is stretched linearly between robust percentiles of the observed pixels
    (`kelp.plotting.rendering.stretch`); not observed pixels are hatched. With both masks the last
    panel shows hits, misses and false alarms.

    Args:
        pixels: a canonical array, shape `(7, height, width)`.
        truth: the true mask, shape `(height, width)`, if known.
        prediction: the predicted mask, same shape, if there is one.
        title: printed above, usually the tile id.
    """
    step = _step((pixels.shape[1], pixels.shape[2]))
    shown = [None if mask is None else _Shown.of([mask], step) for mask in (truth, prediction)]
    return _draw(rendering.shrink_pixels(pixels, step), shown[0], shown[1], title, step)


def _step(shape: tuple[int, int]) -> int:
    """How many pixels of a scene's side are shown as one."""
    return -(-max(shape) // LARGEST_SIDE)


class _Shown(NamedTuple):
    """A mask at the size it is shown, and its full-size facts in words."""

    mask: Mask
    facts: str

    @classmethod
    def of(cls, strips: Iterable[Mask], step: int) -> _Shown:
        small, kelp, unseen, total = [], 0, 0, 0
        for strip in strips:
            small.append(rendering.shrink_mask(strip, step))
            kelp += int((strip == 1).sum())
            unseen += int((strip == MASK_NODATA).sum())
            total += strip.size
        facts = f"{kelp:,} kelp px" if kelp else "no kelp"
        if unseen / total >= 0.005:
            facts += f", {unseen / total:.0%} not observed"
        return cls(np.concatenate(small), facts)


class _Panel(NamedTuple):
    title: str
    note: str
    picture: Picture


def _panels(
    pixels: NDArray[np.float32], truth: _Shown | None, prediction: _Shown | None
) -> list[_Panel]:
    false_color = rendering.composite(pixels, ("SWIR", "NIR", "R"))
    panels = [
        _Panel("True colour", "red, green, blue", rendering.composite(pixels, ("R", "G", "B"))),
        _Panel("False colour", "SWIR, NIR, red: plants green", false_color),
        _Panel("NDVI", "blue water, green plants", rendering.ndvi_picture(pixels)),
    ]
    named = (("Truth", truth), ("Prediction", prediction))
    known = [(name, shown) for name, shown in named if shown is not None]
    for name, shown in known:
        panels.append(_Panel(name, shown.facts, rendering.mask_picture(shown.mask)))
    if truth is not None and prediction is not None:
        picture = rendering.agreement_picture(pixels, truth.mask, prediction.mask)
        panels.append(_Panel("Prediction against truth", "over true colour", picture))
    elif known:
        picture = rendering.overlay_picture(pixels, known[0][1].mask)
        panels.append(_Panel("Kelp in the scene", "over true colour", picture))
    return panels


def _draw(
    pixels: NDArray[np.float32],
    truth: _Shown | None,
    prediction: _Shown | None,
    title: str,
    step: int,
) -> bytes:
    """Lay the panels out with a heading above and one legend below."""
    from matplotlib.figure import Figure

    shown = _panels(pixels, truth, prediction)
    cells, rows, columns = _layout(len(shown))
    height, width = pixels.shape[1:]
    panel_height = _PANEL_INCHES * min(max(height / width, 0.4), 1.5)
    size = (columns * _PANEL_INCHES, rows * (panel_height + _CAPTION) + _HEADING + _LEGEND)
    # At least one screen pixel for each of the scene's: else thin kelp would fall through.
    dpi = max(_LEAST_DPI, round(1.12 * max(height, width) / _PANEL_INCHES))
    figure = Figure(figsize=size, dpi=dpi, facecolor="white")
    grid = figure.add_gridspec(
        rows,
        columns,
        left=_MARGIN,
        right=1 - _MARGIN,
        top=1 - (_HEADING + _CAPTION) / size[1],
        bottom=_LEGEND / size[1],
        wspace=0.04,
        hspace=_CAPTION / panel_height,
    )
    for cell, panel in zip(cells, shown, strict=True):
        _place(figure.add_subplot(grid[cell]), panel)
    note = f"{height} x {width} px"
    if step > 1:
        note = f"1 pixel for {step} x {step}; kelp where any of them is"
    middle = 1 - 0.25 / size[1]
    figure.text(_MARGIN, middle, title, size=15, weight="bold", color=style.INK, va="center")
    figure.text(1 - _MARGIN, middle, note, size=9.5, color=style.QUIET_INK, va="center", ha="right")
    _legend(figure, truth is not None, prediction is not None, _LEGEND / size[1])
    return style.png(figure)


def _layout(panels: int) -> tuple[list[tuple[slice, slice]], int, int]:
    """Cells of the panels, and the numbers of rows and columns: no cell stays empty.

    Five panels: the last one, the overlay, is twice as large, beside the other four.
    """
    if panels == 5:
        small = [(slice(k // 2, k // 2 + 1), slice(2 + k % 2, 3 + k % 2)) for k in range(4)]
        return [*small, (slice(0, 2), slice(0, 2))], 2, 4
    cells = [(slice(k // 3, k // 3 + 1), slice(k % 3, k % 3 + 1)) for k in range(panels)]
    return cells, panels // 3, 3


def _place(axes: Axes, panel: _Panel) -> None:
    axes.imshow(panel.picture, interpolation="nearest", aspect="equal")
    axes.set_anchor("NW")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=style.RULE, linewidth=0.4)  # thin: it covers the outermost pixels
    axes.set_title(panel.title, loc="left", size=11.5, weight="bold", color=style.INK, pad=5)
    height, width = panel.picture.shape[:2]
    if width > 0.9 * height:  # two titles do not fit a narrow panel
        axes.set_title(panel.note, loc="right", size=9, color=style.QUIET_INK, pad=5)


def _legend(figure: Figure, truth: bool, prediction: bool, top: float) -> None:
    from matplotlib.patches import Patch

    def patch(color: Color, words: str, hatch: str = "") -> Patch:
        edge = style.web_color(style.HATCH_DARK) if hatch else style.RULE
        return Patch(
            facecolor=style.web_color(color), edgecolor=edge, hatch=hatch, label=words, lw=0.6
        )

    entries = []
    if truth or prediction:
        entries += [
            patch(style.KELP, "kelp (found)" if truth and prediction else "kelp"),
            patch(style.NO_KELP, "no kelp"),
        ]
    if truth and prediction:
        entries += [patch(style.MISSED, "missed"), patch(style.FALSE, "false alarm")]
    entries.append(patch(style.HATCH_LIGHT, "not observed", "////"))
    figure.legend(
        handles=entries,
        loc="center left",
        bbox_to_anchor=(0.004, top / 2),
        ncols=len(entries),
        frameon=False,
        fontsize=10,
        labelcolor=style.INK,
        handlelength=1.6,
        handleheight=1.1,
        columnspacing=1.8,
    )
