"""Products of satellites with small synthetic rasters, under real names and with real metadata."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray

REAL = Path(__file__).parent / "data" / "landsat"
REAL_SCENES = sorted(path for path in REAL.iterdir() if path.name.startswith("LC08"))

# Product names by satellite; 4, 5 and 7 are those of real MTL files, 9 that of a real STAC item.
PRODUCTS = {
    4: "LT04_L2SP_002026_19830110_20200918_02_T1",
    5: "LT05_L2SR_087017_20090621_20200827_02_T2",
    7: "LE07_L2SP_021030_20100109_20200911_02_T1",
    8: "LC08_L2SP_008059_20191201_20200825_02_T1",
    9: "LC09_L2SP_010065_20220129_20220131_02_T1",
}
SHAPE = (48, 40)
TRANSFORM = Affine(30, 0, 500_000, 0, -30, -5_700_000)  # UTM North, south of the equator
CRS = "EPSG:32621"


def layer(number: int, shape: tuple[int, int] = SHAPE) -> NDArray[np.uint16]:
    """Values of one band, another for each band and pixel, in the range of water."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (7300 + 100 * number + (7 * rows + 3 * columns) % 97).astype(np.uint16)


def write_layer(
    path: Path,
    values: NDArray,
    nodata: float | None = None,
    crs: str | None = CRS,
    transform: Affine = TRANSFORM,
    **options: object,
) -> Path:
    """A tiled one-band GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate", **options}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=1,
        height=values.shape[0],
        width=values.shape[1],
        dtype=values.dtype,
        nodata=nodata,
        crs=crs,
        transform=transform,
        **settings,
    ) as out:
        out.write(values, 1)
    return path


def mtl_of(satellite: int) -> tuple[str, str]:
    """File name and text of the MTL file of `PRODUCTS[satellite]`."""
    product = PRODUCTS[satellite]
    if satellite in (4, 5, 7):
        name = f"{product}_MTL.xml"
        return name, (REAL / "mtl" / name).read_text()
    name = f"{product}_MTL.txt"
    text = (REAL / PRODUCTS[8] / f"{PRODUCTS[8]}_MTL.txt").read_text()
    if satellite == 9:  # its MTL has Landsat 8's groups and names
        text = text.replace(PRODUCTS[8], product).replace("LANDSAT_8", "LANDSAT_9")
        text = text.replace("DATE_ACQUIRED = 2019-12-01", "DATE_ACQUIRED = 2022-01-29")
    return name, text


def make_landsat(
    root: Path,
    satellite: int,
    shape: tuple[int, int] = SHAPE,
    qa: NDArray[np.uint16] | None = None,
    radsat: NDArray[np.uint16] | None = None,
    **options: object,
) -> Path:
    """A product folder: band N holds `layer(N)`; QA_PIXEL is clear water (21952) without `qa`."""
    product = PRODUCTS[satellite]
    folder = root / product
    for number in range(1, 8):
        if satellite in (4, 5, 7) and number == 6:
            continue
        write_layer(folder / f"{product}_SR_B{number}.TIF", layer(number, shape), 0, **options)
    clear = np.full(shape, 21952, np.uint16)
    write_layer(folder / f"{product}_QA_PIXEL.TIF", clear if qa is None else qa, **options)
    zero = np.zeros(shape, np.uint16)
    write_layer(folder / f"{product}_QA_RADSAT.TIF", zero if radsat is None else radsat, **options)
    if satellite in (8, 9):
        aerosol = np.full(shape, 0b0100_0010, np.uint8)
        write_layer(folder / f"{product}_SR_QA_AEROSOL.TIF", aerosol, **options)
    name, text = mtl_of(satellite)
    (folder / name).write_text(text)
    return folder


def copy_real(root: Path, number: int = 0) -> Path:
    """A copy of a real product folder."""
    return Path(shutil.copytree(REAL_SCENES[number], root / REAL_SCENES[number].name))


def tar_of(folder: Path, path: Path | None = None) -> Path:
    """The folder's files in an archive, as USGS delivers them: flat, not compressed."""
    path = path or folder.parent / f"{folder.name}.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    return path


def stack_of(folder: Path, path: Path) -> Path:
    """The product stacked by hand into one GeoTIFF, as users did: six bands with descriptions."""
    satellite = int(folder.name[2:4])
    names = {"SWIR": 6, "NIR": 5, "R": 4, "G": 3, "B": 2}
    if satellite < 8:
        names = {"SWIR": 5, "NIR": 4, "R": 3, "G": 2, "B": 1}
    files = {band: f"{folder.name}_SR_B{number}.TIF" for band, number in names.items()}
    files["QA"] = f"{folder.name}_QA_PIXEL.TIF"
    with rasterio.open(folder / files["NIR"]) as first:
        profile = first.profile | {"count": 6, "dtype": "int32", "nodata": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as out:
        for number, (band, file) in enumerate(files.items(), start=1):
            with rasterio.open(folder / file) as source:
                out.write(source.read(1).astype("int32"), number)
            out.set_band_description(number, band)
    return path


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace text in a file; it must be there."""
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count, f"{pattern} is not in {path}"
    path.write_text(text)
