"""What a path means: a raster, a product of a satellite, a list, or a folder of these."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kelp.config.scenes import SceneOptions
from kelp.errors import InputError
from kelp.io import remote
from kelp.io.files import RASTERS, kind_of, report_unused
from kelp.io.location import Url, locate
from kelp.raster import bands
from kelp.sensors import hls, landsat, sentinel2, stac
from kelp.sensors.aoi import Polygons
from kelp.sensors.elevation import Elevation
from kelp.sensors.parts import SceneFiles, files_of_folder, files_of_tar
from kelp.sensors.quality import NONE, CloudMask, Policy, choose, find_mask, parse_policy
from kelp.sensors.record import SceneFacts
from kelp.sensors.scene import SensorScene, open_product

log = logging.getLogger("kelp")

_SIDECARS: Final = (".aux.xml", ".msk", ".ovr", "_kelp.json")
"""Ends of names of files that lie beside rasters."""
_PRODUCTS: Final = ("_kelp.tif", "_kelp_prob.tif", "_kelp_spread.tif")
"""Ends of the names of kelp's own maps."""
_IMAGE: Final = "_satellite"
"""End of the names of competition scenes, which their products do not keep."""
_WANTED: Final = (
    "rasters (.tif, .vrt), Landsat Collection 2 Level 2 or HLS folders, Landsat .tar, Sentinel-2 "
    ".SAFE"
)


def scene_name(location: Path | Url) -> str:
    """The name of a scene, from which the names of its maps are made; no file is opened.

    `X.tif` and `X_satellite.tif` give `X`, folders and archives the name of their product, items of
    STAC services the last part of their address.
    """
    name = location.name  # a link's own: users name scenes by links
    if name in ("", "..") and isinstance(location, Path):
        name = location.resolve().name
    name = name.partition("?")[0] if isinstance(location, Url) else name
    lower = name.lower()
    known = (*RASTERS, ".tar", ".safe", ".json", ".geojson")
    suffix = next((suffix for suffix in known if lower.endswith(suffix)), "")
    if not suffix and isinstance(location, Path) and not location.is_dir():
        suffix = location.suffix
    name = _without(name[: len(name) - len(suffix)], _IMAGE)
    if suffix.lower() in (".json", ".geojson") or (isinstance(location, Url) and not suffix):
        for end in ("_stac", "_SR"):  # of USGS's items
            name = name.removesuffix(end)
    return name


def _without(name: str, suffix: str) -> str:
    return (
        name[: -len(suffix)] if len(name) > len(suffix) and name.lower().endswith(suffix) else name
    )


def find_scenes(data: Path | Url) -> list[Path | Url]:
    """The scenes of a folder, of a list, of a STAC catalogue, or the one that is named.

    Raises:
        InputError: none, two that would give maps of one name, or one in two versions.
    """
    scenes = _scenes_at(data)
    if not scenes:
        raise InputError(f"{data}: holds no scene; kelp reads {_WANTED}")
    for scene in scenes:
        try:
            _ = isinstance(scene, Path) and scene.exists()
        except OSError as error:  # too long for a name: of a list or a catalogue
            raise InputError(f"{data}: names a scene that is no path ({error.strerror})") from error
    times = Counter(scene_name(scene) for scene in scenes)
    for scene in scenes:
        if times[scene_name(scene)] > 1:
            raise InputError(
                f"{scene}: another of these scenes would also become {scene_name(scene)}_kelp.tif"
            )
    _refuse_versions(scenes)
    return scenes


def _scenes_at(data: Path | Url) -> list[Path | Url]:
    if isinstance(data, Url):
        if stac.is_item(data):
            return stac.items_at(data)
        if data.suffix.lower() == ".txt":
            return _listed(data)
        found = remote.objects_at(data)
        if found == [data]:
            return [data]
        others = [u.name for u in found if not u.name.lower().endswith((*RASTERS, *_SIDECARS))]
        report_unused(data, others)
        return [url for url in found if _is_raster(url.name)]
    if data.is_file():
        if data.suffix.lower() == ".txt":
            return _listed(data)
        if data.suffix.lower() in (".json", ".geojson"):
            return stac.items_at(data)
        return [data]
    if not data.is_dir():
        raise InputError(f"{data}: no such folder or file; check the path")
    if _kind_of_folder(data):
        return [data]
    scenes: list[Path | Url] = []
    unused: list[str] = []
    for entry in sorted(data.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and _kind_of_folder(entry):
            scenes.append(entry)
        elif not entry.is_file():
            unused.append(f"{entry.name} ({kind_of(entry)})")
        elif entry.suffix.lower() == ".tar" or _is_raster(entry.name):
            scenes.append(entry)
        elif not entry.name.lower().endswith((*RASTERS, *_SIDECARS)):
            unused.append(entry.name)
    report_unused(data, unused)
    return scenes


def _listed(data: Path | Url) -> list[Path | Url]:
    lines = [line.strip() for line in remote.read_text(data).splitlines()]
    if any("\0" in line for line in lines):
        raise InputError(f"{data}: holds zero bytes; a list of scenes is a text, one path a line")
    return [locate(line) for line in lines if line and not line.startswith("#")]


def _is_raster(name: str) -> bool:
    return name.lower().endswith(RASTERS) and not name.endswith(_PRODUCTS)


def _kind_of_folder(path: Path) -> str:
    """Of which satellite's products a folder is one; '' = of none."""
    if sentinel2.is_product(path):
        return "sentinel2"
    files = files_of_folder(path)
    if any(landsat.is_band(name) for name in files):
        return "landsat"
    if any(hls.is_band(name) for name in files):
        return "hls"
    try:
        known = landsat.renamed(path, files)
    except InputError:  # said when it is opened
        return "landsat"
    return "landsat" if known else "item" if stac.item_of(path) else ""


def _refuse_versions(scenes: Sequence[Path | Url]) -> None:
    """Raise `InputError` where two scenes are two processings of one."""
    seen: dict[object, Path | Url] = {}
    for scene in scenes:
        parsed = landsat.parse_name(scene_name(scene))
        if parsed is None or parsed[1]:
            continue
        other = seen.setdefault(parsed[0].scene, scene)
        if other is not scene:
            raise InputError(
                f"{scene}: the same scene as {other}, in another version; keep one of them (the "
                "second date in the name is that of processing)"
            )


def open_scene(
    location: Path | Url,
    options: SceneOptions | None = None,
    sign: Callable[[str], str] | None = None,
) -> SensorScene:
    """Open a scene for reading by windows; a context manager.

    Args:
        location: a raster, a product's folder or archive, or a STAC item.
        options: how it is read.
        sign: signs the URLs of a STAC item's assets; default: what `options.sign` names.

    Raises:
        InputError: it cannot be read, or what `options` name does not fit it.
    """
    options = options or SceneOptions()
    wanted = parse_policy(options.quality)
    files = _files_of(location, sign or stac.signer(options.sign))
    if files is None:
        scene = _open_raster(location, options, wanted)
    else:
        if options.band_order:
            raise InputError(
                f"{location}: --band_order is for rasters; this product names its bands"
            )
        scene = open_product(files, lambda files: _policy(files, options, wanted))
    scene.known = scene.known.model_copy(update={"id": scene_name(location)})
    try:
        _attach(scene, options)
    except BaseException:
        scene.__exit__(None, None, None)
        raise
    return scene


def _files_of(location: Path | Url, sign: Callable[[str], str]) -> SceneFiles | None:
    """Which file of a product holds what; None = a plain raster."""
    if isinstance(location, Url):
        return stac.read_item(location, sign) if stac.is_item(location) else None
    if location.is_dir():
        kind = _kind_of_folder(location)
        if kind == "sentinel2":
            return sentinel2.read_product(location)
        if kind == "hls":
            return hls.read_product(location, files_of_folder(location))
        if kind == "item" and (item := stac.item_of(location)):
            return replace(stac.read_item(item, sign), where=location)
        return landsat.read_product(location, files_of_folder(location))
    if not location.is_file():
        raise InputError(f"{location}: no such folder or file; check the path")
    suffix = location.suffix.lower()
    if suffix == ".tar" or location.name.lower().endswith((".tar.gz", ".tgz")):
        return landsat.read_product(location, files_of_tar(location))
    if suffix in (".json", ".geojson"):
        return stac.read_item(location, sign)
    return None


def _policy(files: SceneFiles, options: SceneOptions, wanted: Sequence[str]) -> Policy:
    given = bool(options.quality)
    default = files.default_quality
    if options.cloud_mask and not given:
        default = tuple(name for name in default if name == "fill")
    policy, unknown = choose(str(files.where), files.flags, files.layers, wanted, default, given)
    if unknown:
        log.info("%s: %s has no bit %s", files.where, files.facts.sensor, ", ".join(unknown))
    return policy


def _open_raster(location: Path | Url, options: SceneOptions, wanted: Sequence[str]) -> SensorScene:
    """A plain raster: its QA band is 0 and 1, or Landsat's QA_PIXEL."""
    bits: int | None = bands.QA_PIXEL_BAD
    if options.quality:
        known = landsat.FLAGS[8]
        bits = sum(known[n].mask for n in wanted if n in known and known[n].layer == "QA_PIXEL")
        beyond = [n for n in wanted if n not in known or known[n].layer != "QA_PIXEL"]
        if beyond:
            log.info("%s: a raster's QA band has no bit %s", location, ", ".join(beyond))
    if options.quality == (NONE,) or (options.cloud_mask and not options.quality):
        bits = None
    return SensorScene(
        location,
        facts_of_name(scene_name(location)),
        band_order=options.band_order,
        given_bits=bits,
    )


def facts_of_name(name: str) -> SceneFacts:
    """What the name of a raster says of its scene: a Landsat product's name at its beginning."""
    parsed = landsat.parse_prefix(name)
    return parsed.facts.model_copy(update={"id": name}) if parsed else SceneFacts(id=name)


def _attach(scene: SensorScene, options: SceneOptions) -> None:
    """Add to a scene what options name."""
    shape, place = scene.shape, scene.georeference
    if options.cloud_mask:
        path = find_mask(options.cloud_mask, scene_name(scene.path))
        scene.add_cloud_mask(CloudMask(path, shape, place.crs, place.transform))
    if options.dem:
        elevation = Elevation(
            options.dem, shape, place.crs, place.transform, options.dem_sea_where_absent
        )
        scene.add_elevation(elevation)
        if elevation.known_share < 1:
            rest = "sea" if options.dem_sea_where_absent else "unknown"
            log.info(
                "%s: --dem covers %.0f %% of the scene; the elevation of the rest is %s",
                scene.path,
                100 * elevation.known_share,
                rest,
            )
    elif options.dem_sea_where_absent:
        raise InputError("--dem_sea_where_absent: goes with --dem")
    if options.aoi:
        scene.area = Polygons(options.aoi, shape, place.crs, place.transform, "--aoi")
