"""STAC items of maps: valid by the schemas of STAC 1.1 and its extensions, true of the files."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pystac
import pytest
from affine import Affine
from coasts import UTM, random_map, write_map
from pyproj import Transformer
from rasterio.crs import CRS
from referencing import Registry, Resource

from kelp.cli import main
from kelp.products.maps import open_map
from kelp.products.stac import footprint
from kelp.raster.masks import Georeference

BASE = "https://schemas.stacspec.org/v1.1.0"


EXTENSIONS = {
    "https://stac-extensions.github.io/{}/{}/schema.json".format(*file.stem.split("-", 1)): file
    for file in (Path(__file__).parents[1] / "data" / "stac").glob("*.json")
}


def schemas():
    """Core schemas as pystac brings them, and extensions, by the names they refer to them by."""
    folder = resources.files("pystac.validation") / "jsonschemas"
    found = []
    for file in (folder / "stac-spec" / "v1.1.0").iterdir():
        kind = file.name.removesuffix(".json")
        part = {"item": "item-spec", "collection": "collection-spec", "catalog": "catalog-spec"}
        content = json.loads(file.read_text())
        name = f"{part.get(kind, 'item-spec')}/json-schema/{file.name}"
        found += [(content.get("$id", f"{BASE}/{name}"), content), (f"{BASE}/{name}", content)]
    for file in (folder / "geojson").iterdir():
        content = json.loads(file.read_text())
        found += [(content["$id"], content), (f"https://geojson.org/schema/{file.name}", content)]
    found += [(uri, json.loads(file.read_text())) for uri, file in EXTENSIONS.items()]
    return Registry().with_resources(
        [(uri, Resource.from_contents(content)) for uri, content in found]
    )


REGISTRY = schemas()


def errors(document):
    kind = {"Feature": "item", "Collection": "collection"}[document["type"]]
    core = f"{BASE}/{kind}-spec/json-schema/{kind}.json"
    found = []
    for uri in (core, *document.get("stac_extensions", ())):
        validator = jsonschema.Draft7Validator({"$ref": uri}, registry=REGISTRY)
        found += [f"{uri}: {error.message}" for error in validator.iter_errors(document)]
    return found


def run(folder, out, *more):
    return main(
        ["stac", "--predictions_dir", f"{folder}", "--output_dir", f"{out}", *map(str, more)]
    )


def bundle(folder):
    folder.mkdir()
    spec = {
        "architecture": "unet",
        "encoder": "tu-efficientnet_b5",
        "image_size": 320,
        "bands": ["SWIR", "NIR", "R", "G", "B", "QA", "DEM"],
        "threshold": 0.5,
        "weights_sha256": f"{3:064x}",
    }
    (folder / "bundle.json").write_text(json.dumps(spec))
    (folder / "weights.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("# card")
    return folder


@pytest.fixture
def catalogue(tmp_path):
    mask, p = random_map(0)
    moment = "2023-01-15T13:45:10+00:00"
    write_map(tmp_path / "maps", "A", mask, p, acquired=moment, sensor="landsat-8")
    write_map(tmp_path / "maps", "B", mask, acquired="2023-02-01", sensor="hls-s30")
    assert run(tmp_path / "maps", tmp_path / "stac", "--run_dir", bundle(tmp_path / "b")) == 0
    return tmp_path / "stac"


def test_documents_are_valid(catalogue):
    files = sorted(catalogue.glob("*.json"))
    assert [f.name for f in files] == [
        "A.json",
        "B.json",
        "collection.json",
        "model-000000000000.json",
    ]
    for file in files:
        assert errors(json.loads(file.read_text())) == []


def test_the_check_would_notice_an_error(catalogue):
    item = json.loads((catalogue / "A.json").read_text())
    for broken in (
        {**item, "bbox": None},
        {**item, "properties": {}},
        {**item, "geometry": {"type": "Polygon", "coordinates": [[1]]}},
        {k: v for k, v in item.items() if k != "links"},
    ):
        assert errors(broken)


@pytest.mark.parametrize(
    ("name", "extension", "path", "wrong"),
    [
        ("A", "projection", "properties proj:shape", [60]),
        ("A", "raster", "assets mask bands 0 raster:sampling", "pixel"),
        ("A", "file", "assets mask file:checksum", "SHA-256"),
        ("A", "classification", "assets mask classification:classes 1 name", "giant kelp"),
        ("A", "processing", "properties processing:software", "kelp 1"),
        ("A", "version", "properties version", 1),
        ("model-000000000000", "mlm", "properties mlm:tasks", ["kelp"]),
        ("model-000000000000", "eo", "assets weights eo:bands 2 common_name", "infra-red"),
        ("model-000000000000", "mlm", "properties mlm:output 0 classification:classes 1", {}),
    ],
)
def test_the_check_of_each_extension_would_notice_an_error(catalogue, name, extension, path, wrong):
    item = json.loads((catalogue / f"{name}.json").read_text())
    *there, last = (int(key) if key.isdigit() else key for key in path.split())
    part = item
    for key in there:
        part = part[key]
    part[last] = wrong
    assert any(f"/{extension}/" in error for error in errors(item))


def test_the_packaged_network_is_a_valid_item(tmp_path):
    write_map(tmp_path / "maps", "A", np.eye(5), acquired="2023-01-15")
    assert run(tmp_path / "maps", tmp_path / "stac", "--run_dir", "coasts") == 0
    (model,) = (tmp_path / "stac").glob("model-*.json")
    item = json.loads(model.read_text())
    assert errors(item) == []
    assert set(item["assets"]) == {"weights", "onnx", "card"}


def test_pystac_reads_them(catalogue):
    collection = pystac.Collection.from_file(catalogue / "collection.json")
    items = {item.id: item for item in collection.get_items()}
    assert set(items) == {"A", "B", "model-000000000000"}
    a = items["A"]
    assert a.datetime.isoformat() == "2023-01-15T13:45:10+00:00"
    assert a.ext.proj.code == "EPSG:32721"
    assert a.ext.proj.shape == [60, 50]
    assert a.ext.proj.transform == list(UTM.transform)[:6]
    mask = a.assets["mask"]
    content = (catalogue / mask.href).read_bytes()
    assert mask.ext.file.size == len(content)
    assert mask.ext.file.checksum == "1220" + hashlib.sha256(content).hexdigest()
    assert [(c.value, c.name) for c in mask.ext.classification.classes] == [
        (0, "no-kelp"),
        (1, "kelp"),
        (255, "not-observed"),
    ]
    assert a.assets["probability"].extra_fields["bands"][0]["nodata"] == "nan"
    assert a.properties["platform"] == "landsat-8"
    assert a.properties["processing:lineage"].startswith("Probabilities of net")
    b = items["B"]
    assert b.datetime is None
    assert b.common_metadata.start_datetime.isoformat() == "2023-02-01T00:00:00+00:00"
    assert "probability" not in b.assets
    model = items["model-000000000000"]
    assert model.ext.mlm.architecture == "unet"
    assert model.ext.mlm.input[0].input.shape == [-1, 7, 320, 320]
    assert model.assets["weights"].roles == ["mlm:model"]
    assert collection.extent.spatial.bboxes == [a.bbox]
    assert collection.extent.temporal.intervals[0][1].isoformat() == "2023-02-01T23:59:59+00:00"


def test_same_maps_same_bytes(catalogue, tmp_path):
    first = {f.name: f.read_bytes() for f in catalogue.iterdir()}
    assert run(tmp_path / "maps", catalogue, "--run_dir", tmp_path / "b") == 0
    assert {f.name: f.read_bytes() for f in catalogue.iterdir()} == first


def test_footprints(tmp_path):
    """In degrees, counterclockwise; cut at the antimeridian."""
    mask = np.zeros((100, 100))
    shape, box = footprint(open_map(write_map(tmp_path, "A", mask)))
    ring = np.array(shape["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    area = (ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]).sum() / 2
    assert area > 0
    x, y = [400_000, 403_000], [4_272_000 - 3000, 4_272_000]
    lon, lat = Transformer.from_crs(32721, 4326, always_xy=True).transform(
        [x[0], x[0], x[1], x[1]], [y[0], y[1], y[0], y[1]]
    )
    assert box == pytest.approx([min(lon), min(lat), max(lon), max(lat)], abs=1e-5)
    edge = Georeference(CRS.from_epsg(4326), Affine(0.01, 0, 179.5, 0, -0.01, -40))
    shape, box = footprint(open_map(write_map(tmp_path, "B", mask, georeference=edge)))
    assert shape["type"] == "MultiPolygon"
    assert box == pytest.approx([179.5, -41, -179.5, -40])
    first, second = (np.array(part[0]) for part in shape["coordinates"])
    assert (first[:, 0].max(), second[:, 0].min()) == (180, -180)
    sixty = Georeference(CRS.from_epsg(32601), Affine(30, 0, 360_000, 0, -30, 7_320_000))
    _, box = footprint(open_map(write_map(tmp_path, "E", np.zeros((300, 300)), georeference=sixty)))
    assert box[0] > 179
    assert box[2] < -179
    pole = Georeference(CRS.from_epsg(3413), Affine(30, 0, -1500, 0, -30, 1500))
    shape, box = footprint(open_map(write_map(tmp_path, "F", mask, georeference=pole)))
    assert box[0::2] == [-180, 180]
    assert box[3] == 90
    assert box[1] == pytest.approx(90 - 1500 * 2**0.5 / 111_000, abs=0.002)
    up = Georeference(UTM.crs, UTM.transform @ Affine.scale(1, -1))
    shape, _ = footprint(open_map(write_map(tmp_path, "C", mask, georeference=up)))
    ring = np.array(shape["coordinates"][0])
    assert (ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]).sum() > 0
    assert footprint(open_map(write_map(tmp_path, "D", mask, georeference=Georeference()))) == (
        None,
        None,
    )


def test_maps_without_crs_or_record(tmp_path):
    mask = np.eye(5)
    name = "X_2023-01-15"
    write_map(tmp_path / "maps", name, mask, georeference=Georeference(), record=False)
    assert run(tmp_path / "maps", tmp_path / "stac") == 0
    item = json.loads((tmp_path / "stac" / f"{name}.json").read_text())
    assert errors(item) == []
    assert item["geometry"] is None
    assert item["properties"]["proj:code"] is None


def test_bad_input_is_one_line(tmp_path, capfd):
    write_map(tmp_path / "maps", "A", np.eye(5))
    assert run(tmp_path / "maps", tmp_path / "stac") == 2
    assert "A_kelp.tif has no date" in capfd.readouterr().err
    write_map(tmp_path / "maps", "A", np.eye(5), acquired="2023-01-15")
    assert run(tmp_path / "maps", tmp_path / "stac", "--run_dir", tmp_path) == 2
    assert "holds no bundle.json" in capfd.readouterr().err
    assert not (tmp_path / "stac").exists()
