"""What kelp refuses, and why: cases, and the page of the documentation that is made of them.

PYTHONPATH=.:tests python tests/refusals.py > docs/reference/refusals.md
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from world import write_tif

from kelp.config import PredictConfig
from kelp.data_prep.stats import StatsFile
from kelp.errors import KelpError
from kelp.io.files import check_name
from kelp.raster.bands import BANDS
from kelp.raster.georeference import require_same_grid
from kelp.raster.labels import require_kelp_value
from kelp.raster.masks import Georeference, read_mask, read_probability
from kelp.raster.scene import Scene
from kelp.raster.writer import RasterWriter
from kelp.sensors.opening import find_scenes, open_scene
from kelp.tiling.grid import TileGrid

UTM = {"crs": CRS.from_epsg(32618), "transform": Affine(30, 0, 5e5, 0, -30, -4e6)}


@dataclass(frozen=True)
class Refusal:
    """Something that is refused: what it is, why, and how it comes about in a folder."""

    what: str
    why: str
    provoke: Callable[[Path], object]


def _scene(path: Path, names: tuple[str, ...] = BANDS, dtype: str = "int32", **place) -> Path:
    data = np.random.default_rng(0).integers(7300, 20_000, (len(names) or 7, 8, 9))
    write_tif(path, data.astype(dtype), **(place or UTM))
    with rasterio.open(path, "r+") as out:
        for i, name in enumerate(names, 1):
            out.set_band_description(i, name)
    return path


def _opened(path: Path) -> None:
    with Scene(path) as scene:
        scene.check(BANDS)
        scene.read()


def _text(folder: Path) -> None:
    (folder / "scene.tif").write_text("<html>Not found</html>")
    _opened(folder / "scene.tif")


def _truncated(folder: Path) -> None:
    path = _scene(folder / "scene.tif")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _opened(path)


def _mask(folder: Path, values: object, dtype: str = "uint8", **place) -> Path:
    mask = np.zeros((1, 8, 9), dtype)
    mask[0, 2] = values
    return write_tif(folder / "truth_kelp.tif", mask, **place)


def _shifted(folder: Path) -> None:
    image = _scene(folder / "image.tif")
    east = {**UTM, "transform": UTM["transform"] @ Affine.translation(33, 0)}
    require_same_grid(image, _mask(folder, 1, **east))


def _two_writers(folder: Path) -> None:
    path = folder / "map_kelp.tif"
    with RasterWriter(path, (4, 5), "uint8", _NOWHERE, 255, {}):
        RasterWriter(path, (4, 5), "uint8", _NOWHERE, 255, {}).begin()


def _written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _probability(folder: Path) -> None:
    read_probability(_mask(folder, 40))


def _rgb(folder: Path) -> None:
    read_mask(write_tif(folder / "truth_kelp.tif", np.zeros((3, 8, 9), np.uint8)))


def _cut_tar(folder: Path) -> None:
    name = "LC08_L2SP_008059_20191201_20200825_02_T1.tar"
    header = f"{name[:-4]}_SR_B2.TIF".encode().ljust(100, b"\0") + b"0000644\0" * 3
    header += b"00000100000\0" + b"00000000000\0"
    body = header + b" " * 8 + b"0"
    body += bytes(512 - len(body))
    body = body[:148] + f"{sum(body):06o}\0 ".encode() + body[156:]
    open_scene(_written(folder / name, body + bytes(512)))


_NOWHERE = Georeference()

REFUSALS = {
    "Scenes": (
        Refusal("A page or text named .tif", "There are no pixels in it.", _text),
        Refusal("A file that was cut short", "What is missing would look like sea.", _truncated),
        Refusal(
            "Complex numbers",
            "Their real part alone is no reflectance.",
            lambda f: _opened(_scene(f / "scene.tif", dtype="complex64")),
        ),
        Refusal(
            "Bands without names in a georeferenced file",
            "Only competition files have an order that is known without names.",
            lambda f: _opened(_scene(f / "scene.tif", ())),
        ),
        Refusal(
            "Two bands of one name",
            "Nobody can tell which is meant.",
            lambda f: _opened(_scene(f / "scene.tif", ("NIR", "NIR", "R", "G"))),
        ),
        Refusal(
            "A scene without near infrared",
            "Kelp is told from water by it; without it no pixel counts as observed.",
            lambda f: _opened(_scene(f / "scene.tif", ("R", "G", "B", "QA"))),
        ),
        Refusal(
            "An archive that was cut short",
            "The bands behind the cut are not there.",
            _cut_tar,
        ),
        Refusal(
            "A list of scenes that is no text",
            "Paths would be made of other bytes than those that were meant.",
            lambda f: find_scenes(_written(f / "scenes.txt", b"a.tif\xff\n")),
        ),
        Refusal(
            "A name of which no map can be made",
            "File systems take 255 bytes; it is said before anything runs.",
            lambda f: check_name(f / ("x" * 251 + "_kelp.tif")),
        ),
    ),
    "Masks and probabilities": (
        Refusal(
            "A mask that lies elsewhere than its image",
            "Pixels would be compared with those of another place.",
            _shifted,
        ),
        Refusal(
            "Other values than 0, 1 and 255",
            "A class, a fraction or an untagged -1 would be taken for something.",
            lambda f: read_mask(_mask(f, 2)),
        ),
        Refusal(
            "Masks of 0 and 255 only",
            "255 means not observed; kelp drawn as 255 would be no kelp at all.",
            lambda f: require_kelp_value([_mask(f, 255)]),
        ),
        Refusal("A mask as a picture", "Colours are not classes.", _rgb),
        Refusal(
            "Probabilities beyond 1",
            "Percent or bytes without a scale would all be kelp.",
            _probability,
        ),
    ),
    "Settings and other files": (
        Refusal(
            "A configuration that is no YAML",
            "Options would silently be others than those written.",
            lambda f: PredictConfig.load(_written(f / "c.yaml", "data_dir: [a")),
        ),
        Refusal(
            "Statistics that do not say how they were made",
            "They may be of other masks or indices than those of the run.",
            lambda f: StatsFile.load(_written(f / "stats.json", '{"NIR": {"min": NaN}}')),
        ),
        Refusal(
            "An overlap of almost a whole tile",
            "Sums of votes are exact for at most 1,024 tiles on a pixel.",
            lambda f: TileGrid((500, 500), 128, 125),
        ),
        Refusal(
            "A map that another process is writing",
            "Rows of two processes would be mixed.",
            _two_writers,
        ),
    ),
}


def message(refusal: Refusal, folder: Path) -> str:
    """What kelp says; the folder's path is left out."""
    try:
        refusal.provoke(folder)
    except KelpError as error:
        text = str(error).replace(f"{folder}/", "")
        # GDAL's own words are another release's other ones.
        text = re.sub(r"a readable raster \(.*\);", "a readable raster (GDAL's reason);", text)
        return text.replace("x" * 251, "xxx…")
    raise AssertionError(f"{refusal.what}: not refused")


READ = """\
## What is read, and not observed

Nothing of this is refused: the pixels are 255 in masks, NaN in probabilities, null in tables.

| in a scene | in a mask or probabilities |
|---|---|
| nodata tags, of each band its own; NaN; -32768 | nodata tags other than 0 and 1; NaN; 255 |
| 0 in optical bands of unsigned files without a tag | |
| GDAL mask bands: internal, `.msk`, of a VRT, of single bands | the same |
| an alpha band of 0 | the same |
| one value that no surface has in all optical bands: 0 or below, the extremes of the type | |
| QA that says so (`--qa_as_nodata False`: not) | |
| near infrared missing, or more than two optical bands | |

Of values that no tag names one line tells the share. `pytest tests/raster/test_validity.py` tries
each, in several types.
"""


def page() -> str:
    """The page of the documentation."""
    lines = [
        "# What kelp refuses, and why",
        "",
        "<!-- Made by tests/refusals.py; tests/test_refusals.py keeps it true. -->",
        "",
        "A wrong map is worse than none. What cannot be read rightly ends in one line that names",
        "the file, the cause and the way out, and in exit status 2.",
        "",
        "Of many scenes or images the others are done first: maps, tiles, tables and scores are",
        "made as if the bad ones were not there, in `predict`, `slice`, `metadata`, `stats`,",
        "`evaluate`, `report` and `compare`. A bug that one of them meets is named too; its",
        "traceback is in `kelp-errors.log` beside the outputs, and the exit status is 1",
        "(`pytest tests/io/test_failures.py`).",
        "",
        "Each line below is what kelp says in a test: `pytest tests/test_refusals.py`.",
        "Damaged files of every kind are tried by `python benchmarks/fuzz.py`.",
        "",
    ]
    for title, refusals in REFUSALS.items():
        lines += [f"## {title}", ""]
        for refusal in refusals:
            with tempfile.TemporaryDirectory() as folder:
                said = message(refusal, Path(folder))
            lines += [f"**{refusal.what}.** {refusal.why}", "", "```text", said, "```", ""]
    return "\n".join(lines) + "\n" + READ


if __name__ == "__main__":
    sys.stdout.write(page())
