"""`kelp stac`: a STAC 1.1 item for each map, a collection of them, and the network as an item.

Plain JSON with relative links, so that the folder can be moved or served as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from kelp import __version__
from kelp.config.products import StacConfig
from kelp.errors import BundleError, InputError
from kelp.evaluation.intervals import read_description
from kelp.io.files import output_folder, write_json
from kelp.io.location import packaged
from kelp.plotting.style import KELP, NO_KELP
from kelp.products.maps import Map, find_maps
from kelp.progress import Progress, silent
from kelp.raster.masks import open_dataset
from kelp.sensors.record import MapRecord, Source, record_path

STAC_VERSION: Final = "1.1.0"

_EXTENSIONS: Final = "https://stac-extensions.github.io/{}/schema.json"
PROJECTION: Final = _EXTENSIONS.format("projection/v2.0.0")
RASTER: Final = _EXTENSIONS.format("raster/v2.0.0")
FILE: Final = _EXTENSIONS.format("file/v2.1.0")
CLASSIFICATION: Final = _EXTENSIONS.format("classification/v2.0.0")
PROCESSING: Final = _EXTENSIONS.format("processing/v1.1.0")
EO: Final = _EXTENSIONS.format("eo/v1.1.0")
VERSION: Final = _EXTENSIONS.format("version/v1.2.0")
MLM: Final = _EXTENSIONS.format("mlm/v1.4.0")

_GEOTIFF: Final = "image/tiff; application=geotiff"
_COG: Final = "image/tiff; application=geotiff; profile=cloud-optimized"
_GEOJSON: Final = "application/geo+json"
_COMMON_NAMES: Final = {
    "SWIR": "swir16",
    "NIR": "nir08",
    "R": "red",
    "G": "green",
    "B": "blue",
}
_EDGE_POINTS: Final = 16
_PLATFORMS: Final = {"landsat": "landsat-{}", "sentinel": "sentinel-2"}
_CLASSES: Final = [
    {
        "value": 0,
        "name": "no-kelp",
        "description": "No kelp canopy",
        "color_hint": "{:02X}{:02X}{:02X}".format(*NO_KELP),
    },
    {
        "value": 1,
        "name": "kelp",
        "description": "Kelp canopy",
        "color_hint": "{:02X}{:02X}{:02X}".format(*KELP),
    },
    {"value": 255, "name": "not-observed", "description": "Not observed", "nodata": True},
]
"""The mlm extension wants descriptions, the classification extension names."""

_COLLECTION_LINKS: Final = tuple(
    {"rel": rel, "href": "./collection.json", "type": "application/json"}
    for rel in ("root", "parent", "collection")
)
_HYPERPARAMETERS: Final = (
    "threshold",
    "temperature",
    "tile_size",
    "image_size",
    "resize_strategy",
    "interpolation",
    "normalization_strategy",
    "spectral_indices",
    "index_input",
)


@dataclass(frozen=True)
class Catalogue:
    """What `stac` wrote: the collection, its items, and the network's item, if any."""

    collection: Path
    items: tuple[Path, ...]
    model: Path | None = None

    def summary(self) -> str:
        """One line for the terminal."""
        more = f", {self.model.name}" if self.model else ""
        items = len(self.items)
        return f"wrote {self.collection}: {items} item{'s' * (items != 1)}{more}"


def stac(config: StacConfig, progress: Progress = silent) -> Catalogue:
    """Write STAC items of a folder of maps, and their collection.

    Raises:
        InputError: a map cannot be read or has no date.
        BundleError: `run_dir` holds no bundle.
    """
    maps = find_maps(config.predictions_dir)
    undated = [m.mask.name for m in maps if m.acquired is None]
    if undated:
        raise InputError(
            f"{config.predictions_dir}: {undated[0]} has no date, which a STAC item needs; it "
            "comes from the map's record or name (…_2023-01-15_kelp.tif)"
        )
    network = _read_spec(config.run_dir) if config.run_dir else None
    folder = output_folder(config.output_dir)
    names = {m.scene_id: f"{m.scene_id}.json" for m in maps}
    model = folder / f"{_model_id(network[1])}.json" if network else None
    items = []
    for done, entry in enumerate(maps):
        progress("describing maps", done, len(maps))
        item = _item(entry, folder, config.collection_id)
        if model:
            link = {"rel": "related", "href": f"./{model.name}", "type": _GEOJSON}
            item["links"].append({**link, "title": "the network"})
        items.append(item)
    progress("describing maps", len(maps), len(maps))
    spans = [_span(item["properties"]) for item in items]
    extent = min(start for start, _ in spans), max(end for _, end in spans)
    paths = []
    for entry, item in zip(maps, items, strict=True):
        paths.append(folder / names[entry.scene_id])
        write_json(paths[-1], item)
    if network and model:
        write_json(model, _model(*network, folder, config.collection_id, extent))
    listed = [*names.values(), *([model.name] if model else [])]
    collection = folder / "collection.json"
    write_json(collection, _collection(config, items, listed, extent))
    config.record(folder)
    return Catalogue(collection, tuple(paths), model)


def _item(entry: Map, folder: Path, collection: str) -> dict[str, Any]:
    geometry, bbox = footprint(entry)
    record = entry.record
    assets = _map_assets(entry, folder)
    properties = {**_moment(entry), **_platform(entry), **_projection(entry)}
    properties["version"] = assets["mask"]["file:checksum"][4:16]
    links = list(_COLLECTION_LINKS)
    if record:
        properties |= _processing(entry, record)
        links += [
            {"rel": "derived_from", "href": source.href, "title": source.role}
            for source in record.scene.sources
            if source.href.startswith(("http://", "https://", "s3://"))
        ]
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [
            *(PROJECTION, RASTER, FILE, CLASSIFICATION, VERSION),
            *([PROCESSING] if record else []),
        ],
        "id": entry.scene_id,
        "collection": collection,
        "geometry": geometry,
        **({"bbox": bbox} if bbox else {}),
        "properties": properties,
        "links": links,
        "assets": assets,
    }


def _platform(entry: Map) -> dict[str, Any]:
    family, _, number = (entry.sensor or "").partition("-")
    platform = _PLATFORMS.get(family, "").format(number)
    return {"platform": platform} if platform else {}


def _projection(entry: Map) -> dict[str, Any]:
    crs, transform = entry.georeference.crs, entry.georeference.transform
    epsg = None if crs is None else crs.to_epsg()
    found: dict[str, Any] = {"proj:code": f"EPSG:{epsg}" if epsg else None}
    if crs is not None and not epsg:
        found["proj:wkt2"] = crs.to_wkt()
    found["proj:shape"] = list(entry.shape)
    if transform is not None:
        found["proj:transform"] = list(transform)[:6]
    return found


def _processing(entry: Map, record: MapRecord) -> dict[str, Any]:
    """How the map was made, and what it shows."""
    software = {k: v for k, v in record.versions.items() if isinstance(v, str)}
    found: dict[str, Any] = {
        "processing:software": software or {"kelp": __version__},
        "processing:lineage": (
            f"Probabilities of {entry.network or 'a network'}, kelp where at least "
            f"{entry.threshold}; the record has the settings."
        ),
    }
    if not record.scene.network_validated:
        found["kelp:network_validated"] = False
    for name in ("observed_share", "kelp_pixels", "presence_area_m2", "expected_area_m2"):
        if (value := getattr(record, name)) is not None:
            found[f"kelp:{name}"] = value
    return found


def _map_assets(entry: Map, folder: Path) -> dict[str, Any]:
    """The files of a map."""
    band = {
        "name": "kelp",
        "description": "0 = no kelp, 1 = kelp, 255 = not observed",
        "data_type": "uint8",
        "nodata": 255,
        "raster:sampling": "area",
    }
    mask = _asset(entry.mask, folder, "Kelp mask", band)
    assets = {"mask": {**mask, "classification:classes": _CLASSES}}
    for name, path, words in (
        ("probability", entry.probability, "Probability of kelp"),
        ("spread", entry.spread, "Standard deviation of overlapping tiles' probabilities"),
    ):
        if path:
            assets[name] = _asset(path, folder, words, _band(path, name))
    if entry.record:
        record = _file(record_path(entry.mask), folder, "How the map was made", ["metadata"])
        assets["record"] = {**record, "type": "application/json"}
    return assets


def footprint(entry: Map) -> tuple[dict[str, Any] | None, list[float] | None]:
    """Outline of a map as GeoJSON in degrees, and its bounding box; None without a CRS.

    An outline across the antimeridian is cut there, and west is then greater than east.
    """
    crs, transform = entry.georeference.crs, entry.georeference.transform
    if transform is None or not entry.georeference.on_earth:
        return None, None
    height, width = entry.shape
    along = np.linspace(0, 1, _EDGE_POINTS, endpoint=False)
    corners = np.array([(0, 0), (0, height), (width, height), (width, 0)])  # counterclockwise
    pixels = [
        a + (b - a) * t
        for a, b in zip(corners, np.roll(corners, -1, 0), strict=True)
        for t in along
    ]
    x, y = zip(*(transform @ (float(x), float(y)) for x, y in pixels), strict=True)
    lon, lat = (np.array(v) for v in reproject(crs, CRS.from_epsg(4326), x, y))
    if transform.determinant > 0:  # south-up
        lon, lat = lon[::-1], lat[::-1]
    if not (np.isfinite(lon) & np.isfinite(lat)).all():
        raise InputError(f"{entry.mask}: lies outside its CRS's domain; check its transform")
    lon = np.unwrap(lon, period=360)
    if abs(lon[-1] - lon[0]) > 180:  # around a pole
        pole = 90.0 if lat.mean() > 0 else -90.0
        ends = sorted((pole, float(lat.min() if pole > 0 else lat.max())))
        lon, lat = np.array([-180.0, 180, 180, -180]), np.array(ends).repeat(2)
    lon -= 360 * np.floor((lon.min() + 180) / 360)
    ring = np.stack([lon, lat], axis=1)
    rings = [ring]
    if lon.max() > 180:
        rings = [_cut(ring, 1), _cut(ring, -1) - (360, 0)]
    rings = [np.round(np.concatenate([part, part[:1]]), 7) for part in rings]
    west, east = rings[0][:, 0].min(), rings[-1][:, 0].max()
    south, north = (f(np.concatenate(rings)[:, 1]) for f in (np.min, np.max))
    coordinates = [[part.tolist()] for part in rings]
    shape = {"type": "MultiPolygon", "coordinates": coordinates}
    if len(rings) == 1:
        shape = {"type": "Polygon", "coordinates": coordinates[0]}
    return shape, [float(v) for v in (west, south, east, north)]


def _cut(ring: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """The part of a convex ring west (`side` 1) or east (-1) of 180 degrees."""
    out = []
    inside = side * (180 - ring[:, 0])
    for k in range(len(ring)):
        here, there = ring[k], ring[(k + 1) % len(ring)]
        one, two = inside[k], inside[(k + 1) % len(ring)]
        if one >= 0:
            out.append(here)
        if one * two < 0:
            out.append(here + (there - here) * one / (one - two))
    return np.array(out)


def _moment(entry: Map) -> dict[str, Any]:
    """When: a moment, or the ends of a day where no time is known."""
    if isinstance(entry.acquired, datetime):
        return {"datetime": entry.acquired_text}
    assert entry.day is not None
    start = datetime.combine(entry.day, time(), UTC)
    end = datetime.combine(entry.day, time(23, 59, 59), UTC)
    ends = [moment.isoformat().replace("+00:00", "Z") for moment in (start, end)]
    return {"datetime": None, "start_datetime": ends[0], "end_datetime": ends[1]}


def _span(properties: Mapping[str, Any]) -> tuple[str, str]:
    moment = properties["datetime"]
    return (
        moment or properties["start_datetime"],
        moment or properties["end_datetime"],
    )


def _band(path: Path, name: str) -> dict[str, Any]:
    with open_dataset(path) as dataset:
        kind, nodata, scale = dataset.dtypes[0], dataset.nodata, dataset.scales[0]
    band: dict[str, Any] = {"name": name, "data_type": kind, "raster:sampling": "area"}
    if nodata is not None:
        band["nodata"] = "nan" if np.isnan(nodata) else nodata
    if scale != 1:
        band["raster:scale"] = scale
    return band


def _file(path: Path, folder: Path, title: str, roles: Sequence[str]) -> dict[str, Any]:
    source = Source.of_file("", path)
    return {
        "href": Path(os.path.relpath(path, folder)).as_posix(),
        "title": title,
        "roles": list(roles),
        "file:size": source.size,
        "file:checksum": f"1220{source.sha256}",  # a multihash: SHA-256, 32 bytes
    }


def _asset(path: Path, folder: Path, title: str, band: dict[str, Any]) -> dict[str, Any]:
    with open_dataset(path) as dataset:
        is_cog = dataset.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    found = _file(path, folder, title, ["data"])
    return {**found, "type": _COG if is_cog else _GEOTIFF, "bands": [band]}


def _collection(
    config: StacConfig,
    items: Sequence[dict[str, Any]],
    names: Sequence[str],
    extent: tuple[str, str],
) -> dict[str, Any]:
    boxes = [item["bbox"] for item in items if "bbox" in item]
    if any(box[0] > box[2] for box in boxes) or not boxes:
        whole = [-180.0, -90.0, 180.0, 90.0]
    else:
        whole = [
            min(b[0] for b in boxes),
            min(b[1] for b in boxes),
            max(b[2] for b in boxes),
            max(b[3] for b in boxes),
        ]
    platforms = sorted({i["properties"].get("platform") for i in items} - {None})
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [],
        "id": config.collection_id,
        "title": "Maps of kelp canopy",
        "description": "Masks of kelp canopy (0 = no kelp, 1 = kelp, 255 = not observed) and, "
        "where there are any, probabilities. Areas of masks are upper bounds.",
        "license": config.license,
        "extent": {"spatial": {"bbox": [whole]}, "temporal": {"interval": [list(extent)]}},
        **({"summaries": {"platform": platforms}} if platforms else {}),
        "links": [
            {"rel": "root", "href": "./collection.json", "type": "application/json"},
            *({"rel": "item", "href": f"./{name}", "type": _GEOJSON} for name in names),
        ],
    }


def _read_spec(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    file, spec = read_description(packaged(run_dir))
    if missing := {"architecture", "encoder", "bands", "image_size"} - spec.keys():
        raise BundleError(f"{file}: lacks {', '.join(sorted(missing))}; fetch the bundle again")
    return file.parent, spec


def _eo_band(name: str) -> dict[str, str]:
    common = _COMMON_NAMES.get(name)
    return {"name": name, **({"common_name": common} if common else {})}


def _model(
    bundle: Path,
    spec: Mapping[str, Any],
    folder: Path,
    collection: str,
    extent: tuple[str, str],
) -> dict[str, Any]:
    """A bundle as an item of the mlm extension. Its time is that of the maps."""
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [MLM, EO, FILE, CLASSIFICATION],
        "id": _model_id(spec),
        "collection": collection,
        "geometry": None,
        "properties": {
            "datetime": None,
            "start_datetime": extent[0],
            "end_datetime": extent[1],
            "description": "The network that made the maps; start and end are those of the maps.",
            **_network_properties(spec),
        },
        "links": list(_COLLECTION_LINKS),
        "assets": _model_assets(bundle, folder, spec["bands"]),
    }


def _model_id(spec: Mapping[str, Any]) -> str:
    return f"model-{str(spec.get('weights_sha256'))[:12]}"


def _network_properties(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What goes in and out of a network, and its settings."""
    side, bands = spec["image_size"], list(spec["bands"])
    task, number = "semantic-segmentation", "float32"
    return {
        "mlm:name": f"kelp-{spec['architecture']}-{spec['encoder']}".replace("+", "plus"),
        "mlm:architecture": spec["architecture"],
        "mlm:framework": "PyTorch",
        "mlm:tasks": [task],
        "mlm:input": [
            {
                "name": "scene",
                "bands": bands,
                "input": {
                    "shape": [-1, len(bands), side, side],
                    "dim_order": ["batch", "bands", "height", "width"],
                    "data_type": number,
                },
                "description": "Raw numbers of the sensor; normalising is part of the network.",
            }
        ],
        "mlm:output": [
            {
                "name": "kelp",
                "tasks": [task],
                "result": {
                    "shape": [-1, side, side],
                    "dim_order": ["batch", "height", "width"],
                    "data_type": number,
                },
                "description": "Probability of kelp.",
                "classification:classes": _CLASSES[:2],
            }
        ],
        "mlm:hyperparameters": {name: spec[name] for name in _HYPERPARAMETERS if name in spec},
    }


def _model_assets(bundle: Path, folder: Path, bands: Sequence[str]) -> dict[str, Any]:
    """Weights and card of a bundle."""
    assets = {}
    for name, file, kind in (
        ("weights", "weights.safetensors", "safetensors"),
        ("onnx", "network.onnx", "onnx"),
    ):
        if (bundle / file).is_file():
            asset = _file(bundle / file, folder, f"Weights ({kind})", ["mlm:model"])
            asset |= {"type": "application/octet-stream", "mlm:artifact_type": kind}
            # mlm 1.4 looks for the bands here, or where STAC 1.1 itself forbids them.
            assets[name] = {**asset, "eo:bands": [_eo_band(band) for band in bands]}
    if not assets:
        raise BundleError(f"{bundle}: holds no weights; fetch the bundle again")
    card = bundle / "README.md"
    if card.is_file():
        assets["card"] = _file(card, folder, "Model card", ["metadata"])
        assets["card"]["type"] = "text/markdown"
    return assets
