"""STAC items, catalogues and services, over files and a server process on loopback."""

import json
import os
import shutil

import numpy as np
import pytest
from affine import Affine
from satellites import PRODUCTS, REAL, layer, make_landsat
from stacserver import add_signature, serving
from world import write_tif

from kelp.config.scenes import SceneOptions, SearchConfig
from kelp.errors import ConfigError, InputError
from kelp.io.location import Url
from kelp.sensors import find_scenes, open_scene, scene_name, stac

ITEMS = sorted((REAL / "stac").glob("*.json"))
BANDS = {
    4: (5, 4, 3, 2, 1),
    5: (5, 4, 3, 2, 1),
    7: (5, 4, 3, 2, 1),
    8: (6, 5, 4, 3, 2),
    9: (6, 5, 4, 3, 2),
}


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    """No proxy stands between the tests and their server."""
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)


def product_of(item):
    """The product whose files an item of the collection names, in full."""
    hrefs = [asset["href"] for asset in item["assets"].values()]
    return next(href.rpartition("/")[2] for href in hrefs if "QA_PIXEL" in href)[:40]


def synthetic(root, item):
    """The product of a real item, with small synthetic rasters; its folder."""
    product = product_of(item)
    satellite = int(product[2:4])
    made = make_landsat(root / "made", satellite)
    folder = root / "files" / product
    folder.mkdir(parents=True)
    for file in made.glob("*.TIF"):
        shutil.copyfile(file, folder / file.name.replace(made.name, product))
    shutil.rmtree(root / "made")
    return folder, satellite


def pointed(item, base):
    """The item with its assets at `base`."""
    for asset in item["assets"].values():
        asset["href"] = base + asset["href"].rpartition("/")[2]
    return item


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("where", ["relative", "absolute", "beside"])
def test_items_of_all_generations_are_read(tmp_path, path, where):
    item = json.loads(path.read_text())
    folder, satellite = synthetic(tmp_path, item)
    copy = tmp_path / "item.json"
    if where == "relative":
        copy.write_text(json.dumps(pointed(item, f"files/{folder.name}/")))
    elif where == "absolute":
        copy.write_text(json.dumps(pointed(item, f"{folder}/")))
    else:  # as USGS delivers it: addresses of its web site, files in the same folder
        copy = folder / f"{folder.name}_SR_stac.json"
        copy.write_text(json.dumps(item))
    with open_scene(copy) as scene, open_scene(folder) as same:
        pixels = scene.read()
        for position, number in enumerate(BANDS[satellite]):
            np.testing.assert_array_equal(pixels[position], layer(number))
        np.testing.assert_array_equal(pixels, same.read())
        assert scene.georeference == same.georeference
        assert scene.digest == same.digest  # the maps are the same to the last byte
        facts = scene.known
    assert facts.product_id == folder.name
    assert facts.sensor == f"landsat-{satellite}"
    stated = item["properties"]["datetime"]
    assert facts.acquired.isoformat().startswith(stated[:10])
    assert (len(stated) > 10) == hasattr(facts.acquired, "hour")


@pytest.mark.parametrize("path", ITEMS, ids=lambda path: path.stem)
def test_renamed_files_are_told_by_the_item_beside_them(tmp_path, path):
    item = json.loads(path.read_text())
    folder, _ = synthetic(tmp_path, item)
    with open_scene(folder) as scene:
        pixels = scene.read()
    for key, asset in item["assets"].items():
        name = asset["href"].rpartition("/")[2]
        if (folder / name).is_file():
            asset["href"] = f"./{key.partition('.')[0].lower()}.tif"
            (folder / name).rename(folder / asset["href"])
    (folder / "item.json").write_text(json.dumps(item))
    folder = folder.rename(tmp_path / "reef")  # whatever it is called
    assert find_scenes(tmp_path) == [folder]
    for where in (folder, folder / "item.json"):
        with open_scene(where) as scene:
            np.testing.assert_array_equal(scene.read(), pixels)
            assert scene.known.product_id == product_of(json.loads(path.read_text()))
    with open_scene(folder) as scene:
        assert scene.known.id == "reef"
    # Two items that name the same files, or one of files that are elsewhere, tell nothing.
    shutil.copyfile(folder / "item.json", folder / "again.json")
    assert stac.item_of(folder) is None
    (folder / "again.json").unlink()
    next(folder.glob("*b4.tif" if (folder / "sr_b4.tif").is_file() else "nir08.tif")).unlink()
    assert stac.item_of(folder) is None


def test_names_of_maps_come_from_names_of_items():
    for location, wanted in (
        (
            Url("https://x/collections/c/items/LC08_L2SP_047027_20201204_02_T1"),
            "LC08_L2SP_047027_20201204_02_T1",
        ),
        (Url("https://x/items/LC08_L2SP_008059_20191201_20200825_02_T1_SR"), PRODUCTS[8]),
        (Url(f"https://x/{PRODUCTS[8]}_SR_stac.json"), PRODUCTS[8]),
        (Url("https://x/item.json?sig=abc"), "item"),
        (REAL / PRODUCTS[8] / f"{PRODUCTS[8]}_SR_stac.json", PRODUCTS[8]),
        (REAL / PRODUCTS[8], PRODUCTS[8]),
    ):
        assert scene_name(location) == wanted


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with a product of Landsat 9, its item, and items for searching."""
    root = tmp_path_factory.mktemp("server")
    item = json.loads((REAL / "stac" / "LC09_L2SP_010065_20220129_02_T1.json").read_text())
    folder, _ = synthetic(root, item)
    (root / "items").mkdir()
    with serving(root) as address:
        for cloud, day in (
            (5, "2022-01-29"),
            (60, "2022-02-14"),
            (None, "2022-03-02"),
            (20, "2023-01-29"),
            (9, "2022-03-18"),
        ):
            made = pointed(json.loads(json.dumps(item)), f"{address}/files/files/{folder.name}/")
            made["id"] = f"LC09_{day}"
            made["properties"]["datetime"] = f"{day}T15:28:34Z"
            made["properties"].pop("eo:cloud_cover")
            if cloud is not None:
                made["properties"]["eo:cloud_cover"] = cloud
            made["links"] = []
            (root / "items" / f"{made['id']}.json").write_text(json.dumps(made))
        yield address, root, folder


def test_an_item_of_a_service_is_read_over_http(server):
    address, _, folder = server
    url = Url(f"{address}/api/items/LC09_2022-01-29")
    assert find_scenes(url) == [url]
    with open_scene(url) as scene, open_scene(folder) as same:
        np.testing.assert_array_equal(scene.read(), same.read())
        assert scene.known.cloud_cover == 5
        source = scene.facts.sources[0]
        assert source.etag
        assert source.sha256 is None
        assert source.href.startswith(f"{address}/files/")


def relative_copy(server, name, base):
    """An item on the server whose assets lie at `base`."""
    _, root, _ = server
    item = json.loads((root / "items" / "LC09_2022-01-29.json").read_text())
    pointed(item, base)
    (root / name).write_text(json.dumps(item))


def test_relative_addresses_count_from_the_item(server):
    address, _, folder = server
    relative_copy(server, "relative.json", f"./files/{folder.name}/")
    with open_scene(Url(f"{address}/files/relative.json")) as scene:
        np.testing.assert_array_equal(scene.read()[1], layer(5))


def test_signed_addresses(server):
    address, _, folder = server
    relative_copy(server, "signed.json", f"{address}/signed/files/{folder.name}/")
    url = Url(f"{address}/files/signed.json")
    with pytest.raises(InputError, match=r"403|denied|not a readable raster"), open_scene(url):
        pass
    options = SceneOptions(sign="stacserver:add_signature")
    with open_scene(url, options) as scene:
        np.testing.assert_array_equal(scene.read()[1], layer(5))
        assert "secret" not in scene.facts.model_dump_json()
    with open_scene(url, sign=add_signature) as scene:
        np.testing.assert_array_equal(scene.read()[1], layer(5))


@pytest.mark.parametrize("name", ["nowhere", "nowhere:f", "os:nothing", "os"])
def test_a_signer_that_is_none_is_named(name):
    with pytest.raises(ConfigError, match="sign"):
        stac.signer(name)


def test_an_asset_that_is_missing_or_a_web_page_is_named(server):
    address, _, _ = server
    for base in (f"{address}/nowhere/", f"{address}/html/"):
        relative_copy(server, "bad.json", base)
        with pytest.raises(InputError, match=r"SR_B.*not a readable raster") as caught:
            open_scene(Url(f"{address}/files/bad.json"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere/items/x", "html/items/x", "files/no.json"])
def test_an_item_that_is_missing_or_a_web_page_is_named(server, path):
    address, _, _ = server
    with pytest.raises(InputError, match=r"HTTP 404|not JSON"):
        find_scenes(Url(f"{address}/{path}"))


def searched(server, tmp_path, api="api", **options):
    address, _, _ = server
    config = SearchConfig(
        stac=f"{address}/{api}",
        output=tmp_path / "scenes.txt",
        **{"bbox": "-81,-8,-78,-6", "collection": "landsat-c2-l2", **options},
    )
    result = stac.search(config)
    assert (tmp_path / "scenes.txt").read_text().split() == list(result.items)
    return [item.rpartition("/")[2] for item in result.items]


def test_a_search_pages_through_all_and_sorts_by_time(server, tmp_path):
    assert searched(server, tmp_path) == [
        "LC09_2022-01-29",
        "LC09_2022-02-14",
        "LC09_2022-03-02",
        "LC09_2022-03-18",
        "LC09_2023-01-29",
    ]


def test_a_search_asks_for_box_dates_and_clouds(server, tmp_path):
    # The server ignores what it is asked for, as some do: what comes is checked.
    found = searched(server, tmp_path, datetime="2022-01-01/2022-12-31", max_cloud=20)
    assert found == ["LC09_2022-01-29", "LC09_2022-03-18"]
    posted = json.loads((server[1] / "posted.json").read_text())
    assert posted["bbox"] == [-81, -8, -78, -6]
    assert posted["collections"] == ["landsat-c2-l2"]
    assert posted["datetime"].startswith("2022-01-01")
    assert posted["query"] == {"eo:cloud_cover": {"lte": 20}}


def test_the_list_of_a_search_is_read_as_scenes(server, tmp_path):
    searched(server, tmp_path, max_cloud=5)
    (scene,) = find_scenes(tmp_path / "scenes.txt")
    with open_scene(scene) as opened:
        np.testing.assert_array_equal(opened.read()[1], layer(5))


def test_a_search_by_area(server, tmp_path):
    path = tmp_path / "aoi.geojson"
    ring = [[-80, -8], [-79, -8], [-79, -7], [-80, -7], [-80, -8]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    assert len(searched(server, tmp_path, bbox=None, aoi=path)) == 5
    assert json.loads((server[1] / "posted.json").read_text())["bbox"] == [-80, -8, -79, -7]


def test_searches_that_find_nothing_or_no_service_are_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(stac, "TIMEOUT", 1.0)
    for api, message in (
        ("empty", "holds no scene"),
        ("nowhere", "HTTP 404"),
        ("html", "not JSON"),
        ("slow", "does not answer"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            searched(server, tmp_path, api)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="holds no scene"):
        searched(server, tmp_path, bbox="170,-8,175,-6")


@pytest.mark.parametrize(
    "options", [{}, {"bbox": "1,2,3,4", "aoi": "x"}, {"bbox": "1,2,3"}, {"bbox": "1,5,2,4"}]
)
def test_a_search_needs_one_box(options):
    with pytest.raises(ConfigError, match="bbox"):
        SearchConfig(stac="x", **options)


def catalogue(tmp_path, boxes):
    """A static catalogue with an item for each box, in a child."""
    import pystac

    item = json.loads((REAL / "stac" / "LC09_L2SP_010065_20220129_02_T1.json").read_text())
    item = pointed(item, "./")
    root = pystac.Catalog("root", "x")
    child = pystac.Catalog("child", "x")
    root.add_child(child)
    for number, (box, day) in enumerate(boxes):
        made = pystac.Item.from_dict({**json.loads(json.dumps(item)), "links": []})
        made.id, made.bbox, made.collection_id = f"item{number}", list(box), None
        made.datetime = pystac.utils.str_to_datetime(f"{day}T12:00:00Z")
        child.add_item(made)
    root.normalize_and_save(str(tmp_path / "catalogue"), pystac.CatalogType.SELF_CONTAINED)
    return tmp_path / "catalogue" / "catalog.json"


def test_a_static_catalogue_is_a_list_of_scenes(tmp_path):
    path = catalogue(tmp_path, [((1, 1, 2, 2), "2020-01-01"), ((3, 3, 4, 4), "2021-01-01")])
    assert [scene.name for scene in find_scenes(path)] == ["item0.json", "item1.json"]
    config = SearchConfig(
        stac=str(path), bbox="0,0,10,10", datetime="2020-06-01/..", output=tmp_path / "s.txt"
    )
    assert [item.rpartition("/")[2] for item in stac.search(config).items] == ["item1.json"]


def linked(folder, **documents):
    """Catalogues that lead to each other: `rel href` for each link."""
    for name, links in documents.items():
        pairs = [link.split(" ", 1) for link in links]
        document = {
            "type": "Catalog",
            "stac_version": "1.0.0",
            "id": name,
            "description": "x",
            "links": [{"rel": rel, "href": href} for rel, href in pairs],
        }
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder / "root.json"


@pytest.mark.parametrize(
    "documents",
    [
        {"root": ["child root.json", "item x.json"]},
        {"root": ["child a.json"], "a": ["child ./root.json", "child y/../a.json", "item x.json"]},
        {"root": ["child a.json"] * 3, "a": ["item x.json", "item ./x.json", "child root.json"]},
    ],
    ids=["itself", "each other", "many times"],
)
def test_catalogues_that_lead_back_are_read_once(tmp_path, documents):
    root = linked(tmp_path, **documents)
    assert stac.items_at(root) == [tmp_path / "x.json"]


def test_items_come_in_the_order_of_the_links(tmp_path):
    root = linked(
        tmp_path,
        root=["child a.json", "item 1.json", "child b.json", "item 2.json"],
        a=["child c.json", "item 3.json"],
        b=["item 5.json"],
        c=["item 4.json"],
    )
    assert [place.stem for place in stac.items_at(root)] == ["1", "2", "3", "4", "5"]


def test_a_chain_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stac, "MOST_CATALOGUES", 5)
    chain = {f"c{i}": [f"child c{i + 1}.json"] for i in range(6)}
    root = linked(tmp_path, root=["child c0.json"], **chain)
    with pytest.raises(InputError, match="more than 5 catalogues"):
        stac.items_at(root)


@pytest.mark.parametrize(
    ("href", "message"),
    [
        ("/dev/zero", "no such file"),
        ("x" * 5000, "no such file"),
        ("pipe.json", "no such file"),
        ("huge.json", "no STAC document"),
        ("", "no address"),
    ],
)
def test_links_to_what_never_ends_or_cannot_be_are_refused(tmp_path, href, message):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    root = linked(tmp_path, root=[f"child {href}"])
    with pytest.raises(InputError, match=message):
        stac.items_at(root)


@pytest.mark.parametrize("name", ["blue", "scl"])
def test_assets_whose_names_no_file_can_have_are_refused(tmp_path, name):
    keys = ("blue", "green", "red", "nir08", "swir16", "scl")
    path = tmp_path / "item.json"
    document = {
        "type": "Feature",
        "collection": "sentinel-2-l2a",
        "properties": {"s2:processing_baseline": "03.00"},
        "assets": {key: {"href": "x" * 5000 if key == name else f"{key}.tif"} for key in keys},
    }
    path.write_text(json.dumps(document))
    for key in keys:
        place = {"crs": "EPSG:32618", "transform": Affine(10, 0, 5e5, 0, -10, -4e6)}
        write_tif(tmp_path / f"{key}.tif", np.ones((1, 4, 4), np.uint16), **place)
    with pytest.raises(InputError, match="no such file"), open_scene(path):
        pass


def test_an_item_whose_name_no_file_can_have_is_refused(tmp_path):
    root = linked(tmp_path, root=[f"item {'x' * 5000}.json"])
    with pytest.raises(InputError, match="names a scene that is no path"):
        find_scenes(root)


def test_relative_links_of_a_store_count_from_the_document():
    base = Url("s3://bucket/catalogues/root.json?versionId=3")
    assert str(stac._join(base, "./a/b.json")) == "s3://bucket/catalogues/a/b.json"
    assert str(stac._join(base, "../c.json")) == "s3://bucket/c.json"
    assert str(stac._join(base, "https://x/y.json")) == "https://x/y.json"


def test_boxes_across_the_antimeridian(tmp_path):
    boxes = [(179, 1, -179, 2), (-179.5, 1, -178, 2), (170, 1, 172, 2)]
    path = catalogue(tmp_path, [(box, "2020-01-01") for box in boxes])
    config = SearchConfig(stac=str(path), bbox="178,0,-178.5,3", output=tmp_path / "s.txt")
    found = [item.rpartition("/")[2] for item in stac.search(config).items]
    assert sorted(found) == ["item0.json", "item1.json"]


@pytest.mark.parametrize(
    "document, message",
    [
        ([], "not a STAC document"),
        ({"type": "FeatureCollection", "features": []}, "collection of features"),
        ({"type": "Feature"}, "neither a STAC item"),
    ],
)
def test_documents_of_another_kind_are_refused(tmp_path, document, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        find_scenes(path)


def test_items_of_other_sensors_and_scales_are_refused(tmp_path):
    item = json.loads((REAL / "stac" / "LC09_L2SP_010065_20220129_02_T1.json").read_text())
    path = tmp_path / "x.json"
    item["assets"]["red"]["raster:bands"][0]["offset"] = 0
    path.write_text(json.dumps(item))
    with pytest.raises(InputError, match="offset of band red is 0"):
        open_scene(path)
    item["assets"] = {"image": {"href": "image.tif"}}
    item["collection"] = "naip"
    path.write_text(json.dumps(item))
    with pytest.raises(InputError, match=r"naip.*does not read"):
        open_scene(path)


def sentinel2_item(tmp_path, baseline, applied=None, offset=None):
    """An item as Earth Search has it, 10 m and 20 m bands."""
    from affine import Affine
    from satellites import write_layer

    assets = {}
    for key, size in (
        ("blue", 40),
        ("green", 40),
        ("red", 40),
        ("nir08", 20),
        ("swir16", 20),
        ("scl", 20),
    ):
        values = np.full((size, size), 4000 if key != "scl" else 6, np.uint16)
        if size == 40:
            values[::2] += 2  # the mean of four is 1 more
        write_layer(
            tmp_path / f"{key}.tif",
            values,
            0,
            "EPSG:32721",
            Affine(800 / size, 0, 500_000, 0, -800 / size, 4_300_000),
        )
        assets[key] = {"href": f"./{key}.tif"}
        if offset is not None and key != "scl":
            assets[key]["raster:bands"] = [{"scale": 0.0001, "offset": offset}]
    properties = {"datetime": "2024-01-01T00:00:00Z", "s2:processing_baseline": baseline}
    if applied is not None:
        properties["earthsearch:boa_offset_applied"] = applied
    path = tmp_path / "S2B_21FVC_20240101_0_L2A.json"
    path.write_text(
        json.dumps(
            {
                "type": "Feature",
                "stac_version": "1.0.0",
                "id": path.stem,
                "links": [],
                "collection": "sentinel-2-l2a",
                "properties": properties,
                "assets": assets,
            }
        )
    )
    return path


@pytest.mark.parametrize(
    "baseline, applied, offset, added",
    [
        ("02.14", None, None, 0),
        ("05.10", False, None, -1000),
        ("05.10", True, None, 0),
        ("05.10", True, -0.1, 0),  # a known contradiction: the pixels are what counts
        ("05.10", None, -0.1, -1000),
        ("05.10", None, 0, 0),
    ],
)
def test_sentinel_2_items_say_what_was_added(tmp_path, baseline, applied, offset, added):
    with open_scene(sentinel2_item(tmp_path, baseline, applied, offset)) as scene:
        pixels = scene.read()
        assert scene.shape == (20, 20)
        assert not scene.known.network_validated
    swir, blue = pixels[0, 5, 5], pixels[4, 5, 5]
    for found, value in ((swir, 4000), (blue, 4001)):
        reflectance = (value + added) / 10_000
        assert found == pytest.approx((reflectance + 0.2) / 2.75e-5, rel=1e-6)


@pytest.mark.parametrize("baseline", ["05.10", None])
def test_sentinel_2_items_that_do_not_say_are_refused(tmp_path, baseline):
    with pytest.raises(InputError, match="baseline"):
        open_scene(sentinel2_item(tmp_path, baseline))
