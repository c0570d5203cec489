"""Kinds of files that kelp reads: a good one, how it is changed, and who reads it.

A reader may raise `KelpError`, whose message is one line; the command line turns it into exit
status 2. Anything else is a fault: another exception, a warning, a word of a C library on stderr,
a new file, more than 1 GB, more than 20 seconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from affine import Affine
from bundles import tiny_spec
from fuzzing import mutations
from rasterio.crs import CRS
from world import coast, write_tif

from kelp import tables
from kelp.cli.console import reporting
from kelp.config import PredictConfig, SliceConfig, SplitConfig, TrainConfig
from kelp.config.scenes import SearchConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.data_prep.split import split_fold
from kelp.data_prep.stats import StatsFile
from kelp.errors import KelpError
from kelp.inference.backends.onnx import OnnxFile
from kelp.inference.bundle import load_bundle
from kelp.inference.outputs import JournalFile, journal_path
from kelp.inference.sections import SectionFile
from kelp.nn.bundle import save_bundle
from kelp.nn.data.datamodule import read_fold
from kelp.nn.model import KelpNet
from kelp.raster.bands import BANDS
from kelp.raster.masks import read_mask, read_probability, read_tags
from kelp.raster.scene import Scene
from kelp.raster.statistics import About
from kelp.raster.streaming import unit_stats
from kelp.sensors.opening import find_scenes, open_scene
from kelp.sensors.stac import search
from kelp.tiling.engine import Section
from kelp.tiling.merge import MergerState

DATA = Path(__file__).parents[1] / "data"
GIGABYTE = 1 << 30
# libtiff's own handler writes this where GDAL seeks too far; Python has no way to set another.
KNOWN = {"_tiffSeekProc: Invalid argument."}
SECONDS = 20
SHAPE = (20, 26)


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    `make` fills an empty folder and returns the file to change; `readers` take that path.
    """

    make: Callable[[Path], Path]
    mutate: mutations.Mutate
    readers: tuple[Callable[[Path], object], ...]
    refuse: tuple[Callable[[Path], object], ...] = ()
    """Those of the readers that refuse the good one, too."""


def _geotiff(folder: Path) -> Path:
    image, mask = coast(SHAPE, np.random.default_rng(0))
    place = {"crs": CRS.from_epsg(32618), "transform": Affine(30, 0, 5e5, 0, -30, -4e6)}
    write_tif(folder / "mask.tif", mask[np.newaxis])
    path = write_tif(folder / "scene.tif", image, nodata=-32768, **place)
    with rasterio.open(path, "r+") as out:
        out.descriptions = BANDS
        out.update_tags(A="b", AREA_OR_POINT="Area")
    return path


def _mask(folder: Path) -> Path:
    _geotiff(folder)
    return folder / "mask.tif"


def _vrt(folder: Path) -> Path:
    source = _geotiff(folder)
    path = folder / "scene.vrt"
    rasterio.shutil.copy(source, path, driver="VRT")
    other = path.read_text().replace("scene.tif", "scene.vrt")  # of itself
    (folder / "again.vrt").write_text(other)
    return path


def _read_scene(path: Path) -> None:
    with Scene(path) as scene:
        scene.check()
        scene.sample(64)
        assert scene.reading
        scene.read()


def _open_scene(path: Path) -> None:
    with open_scene(path) as scene:
        scene.sample(64)


def _read_stored(path: Path) -> None:
    with Scene(path) as scene:
        scene.read_stored()


def _read_folder(path: Path) -> None:
    for scene in find_scenes(path.parent):
        _open_scene(scene)


def _landsat(folder: Path) -> Path:
    source = next(iter(sorted((DATA / "landsat").iterdir())))
    target = folder / source.name
    shutil.copytree(source, target)
    return next(target.glob("*_MTL.txt"))


def _landsat_json(folder: Path) -> Path:
    return next(_landsat(folder).parent.glob("*_MTL.json"))


def _stac(folder: Path) -> Path:
    return next(_landsat(folder).parent.glob("*_stac.json"))


def _catalogue(folder: Path) -> Path:
    """A catalogue with an item and two children, one of which leads back."""
    item = _stac(folder)
    about = {"type": "Catalog", "stac_version": "1.0.0", "description": "x"}
    root = folder / "catalog.json"
    for path, links in (
        (root, (("item", item), ("child", folder / "a.json"), ("child", folder / "b.json"))),
        (folder / "a.json", (("root", root), ("parent", root), ("child", root))),
        (folder / "b.json", ()),
    ):
        linked = [{"rel": rel, "href": f"./{to.relative_to(folder)}"} for rel, to in links]
        path.write_text(json.dumps({**about, "id": path.stem, "links": linked}))
    return root


def _read_catalogue(path: Path) -> None:
    for scene in find_scenes(path):
        _open_scene(scene)


def _search(path: Path) -> None:
    out = path.parent / "out" / "scenes.txt"
    out.parent.mkdir(exist_ok=True)
    search(SearchConfig(stac=str(path), bbox="-180,-90,180,90", output=out))


def _tar(folder: Path) -> Path:
    import tarfile

    source = _landsat(folder).parent
    path = folder / f"{source.name}.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(source.iterdir()):
            archive.add(file, file.name)
    shutil.rmtree(source)
    return path


def _open_parent(path: Path) -> None:
    _open_scene(path.parent)


def _sliced(folder: Path) -> Path:
    for name in ("AA", "BB"):
        image, mask = coast(SHAPE, np.random.default_rng(len(name)))
        write_tif(folder / "train" / "images" / f"{name}_satellite.tif", image)
        write_tif(folder / "train" / "masks" / f"{name}_kelp.tif", mask[np.newaxis])
    facts = {name: [0.5, 0.25] for name in tables.FACTS}
    rows = {"tile_id": ["AA", "BB"], "original_split": ["train", "train"], **facts}
    for kind in ("image", "mask"):
        end = "images/{}_satellite.tif" if kind == "image" else "masks/{}_kelp.tif"
        rows[f"{kind}_path"] = [f"train/{end}".format(name) for name in rows["tile_id"]]
    table = pd.DataFrame({**rows, "split_0": ["val", "train"]})
    table.to_parquet(folder / "table.parquet")
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.parquet"


def _csv(folder: Path) -> Path:
    _sliced(folder)
    return folder / "table.csv"


def _slice(path: Path) -> None:
    config = SliceConfig(
        data_dir=path.parent / "train",
        metadata_fp=path,
        output_dir=path.parent / "out",
        image_size=16,
        workers=1,
        materialize=False,
    )
    slice_dataset(config)


def _split(path: Path) -> None:
    folder = path.parent
    split_fold(SplitConfig(data_dir=folder, metadata_fp=path, output_dir=folder / "out"))


def _fold(path: Path) -> None:
    folder = path.parent
    read_fold(TrainConfig(data_dir=folder, metadata_fp=path, output_dir=folder / "out"))


def _statistics(folder: Path) -> Path:
    about = About(None, 3, True, True, "nan", "dn", "0")
    path = folder / "stats.json"
    StatsFile({name: unit_stats(4, 5) for name in BANDS}, about).save(path)
    return path


def _bundle(folder: Path) -> Path:
    spec = tiny_spec(decoder_channels=(4, 4), encoder="tu-test_resnet")
    return save_bundle(folder / "bundle", KelpNet(spec), spec) / "bundle.json"


def _weights(folder: Path) -> Path:
    return _bundle(folder).with_name("weights.safetensors")


def _onnx(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    path = folder / "net.onnx"
    node = helper.make_node("Sigmoid", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 7, 8, 8]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]))
    helper.set_model_props(model, {"kelp": "{}"})
    onnx.save(model, path)
    return path


def _yaml(folder: Path) -> Path:
    path = folder / "kelp-predict.yaml"
    config = PredictConfig(data_dir=folder, run_dir=(folder,), output_dir=folder / "out")
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


def _journal(folder: Path) -> Path:
    path = folder / "X_kelp.tif"
    JournalFile(path, "f").save(MergerState.empty(4, 9, 1), lambda: [7])
    return journal_path(path)


def _read_journal(path: Path) -> None:
    journal = JournalFile(path.parent / "X_kelp.tif", "f")
    if (entry := journal.load()) is not None:
        assert entry.state.bottom >= 0


def _section(folder: Path) -> Path:
    file = SectionFile(folder / "X_kelp.tif", Section(0, 1), "f")
    sink = file.sink(False)
    sink.write(0, np.zeros((3, 9), np.float32))
    sink.close()
    return next(folder.rglob("*.npz"))


def _read_section(path: Path) -> None:
    file = SectionFile(path.parent.parent / "X_kelp.tif", Section(0, 1), "f")
    if file.exists:
        file.edges()
        file.copy(lambda rows: None, 9, 1)


def _list(folder: Path) -> Path:
    _geotiff(folder)
    path = folder / "scenes.txt"
    path.write_text(f"{folder / 'scene.tif'}\n# no more\n")
    return path


KINDS = {
    "geotiff": Kind(_geotiff, mutations.change_bytes, (_read_scene, _read_stored, _open_scene)),
    "mask": Kind(_mask, mutations.change_bytes, (read_mask, read_probability, read_tags)),
    "vrt": Kind(_vrt, mutations.change_text, (_read_scene, read_mask, read_tags), (read_mask,)),
    "mtl": Kind(_landsat, mutations.change_text, (_open_parent,)),
    "mtl.json": Kind(_landsat_json, mutations.change_json, (_open_parent,)),
    "stac": Kind(_stac, mutations.change_json, (_open_scene, find_scenes)),
    "catalogue": Kind(_catalogue, mutations.change_json, (_read_catalogue, _search)),
    "tar": Kind(_tar, mutations.change_tar, (_open_scene,)),
    "parquet": Kind(_sliced, mutations.change_parquet, (_slice, _split, _fold)),
    "csv": Kind(_csv, mutations.change_text, (_slice, _split, _fold)),
    "statistics": Kind(_statistics, mutations.change_json, (StatsFile.load,)),
    "bundle": Kind(_bundle, mutations.change_json, (lambda path: load_bundle(path.parent),)),
    "weights": Kind(_weights, mutations.change_bytes, (lambda path: load_bundle(path.parent),)),
    "onnx": Kind(_onnx, mutations.change_bytes, (OnnxFile.read,), (OnnxFile.read,)),
    "yaml": Kind(_yaml, mutations.change_text, (PredictConfig.load,)),
    "journal": Kind(_journal, mutations.change_zip, (_read_journal,)),
    "section": Kind(_section, mutations.change_zip, (_read_section,)),
    "list": Kind(_list, mutations.change_text, (find_scenes,)),
}


@contextmanager
def _limits() -> Iterator[None]:
    """At most 1 GB more than now, and 20 seconds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))

    def late(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _stderr(heard: list[str]) -> Iterator[None]:
    """What is written to stderr, by C libraries, too."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            heard.append(file.read().decode("utf-8", "replace"))


def _files(folder: Path) -> set[str]:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    return {name for name in found if name.split("/")[1:2] != ["out"]}


def _read(reader: Callable[[Path], object], path: Path, must: bool = False) -> str | None:
    """What a reader does wrong, as text."""
    heard: list[str] = []
    wrong = None
    with _stderr(heard), reporting(quiet=True), _limits(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            reader(path)
        except KelpError as error:
            if must:
                wrong = f"refused: {error}"
            if "\n" in str(error).strip() or not str(error).strip():
                wrong = f"not one line: {error}"
        except Exception:  # noqa: BLE001  # whatever it is, it is the fault that is looked for
            wrong = traceback.format_exc()
    strange = [
        line
        for line in heard[0].splitlines()
        if not line.startswith("kelp: ") and line not in KNOWN
    ]
    if wrong is None and strange:
        wrong = f"on stderr: {heard[0]}"
    return wrong


def cases(name: str, numbers: range, folder: Path) -> Iterator[str]:
    """Faults that the cases of a kind meet; each case is reproduced by its number."""
    kind = KINDS[name]
    good = folder / "good"
    good.mkdir()
    path = kind.make(good)
    for reader in kind.readers:
        if wrong := _read(reader, path, must=reader not in kind.refuse):
            yield f"{name}, unchanged: {wrong}"
    content = path.read_bytes()
    before = None
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        if not path.parent.is_dir():  # a damaged section is thrown away, with those beside it
            path = kind.make(good)
        path.write_bytes(kind.mutate(content, rng))
        before = before or _files(folder)
        for reader in kind.readers:
            if wrong := _read(reader, path):
                yield f"{name}, case {number}: {wrong}"
        if new := _files(folder) - before:
            yield f"{name}, case {number}: left {sorted(new)}"
            before |= new
        shutil.rmtree(good / "out", ignore_errors=True)
        if Path("executed").exists():
            yield f"{name}, case {number}: ran what it read"
            Path("executed").rmdir()
