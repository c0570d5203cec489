"""Small maps with a georeference, a record and a known answer."""

from datetime import date, datetime

import numpy as np
from affine import Affine
from rasterio.crs import CRS

from kelp.raster.masks import Georeference
from kelp.raster.writer import RasterWriter, write_mask
from kelp.sensors.record import (
    RECORD_SUFFIX,
    Grid,
    MapRecord,
    NetworkFacts,
    SceneFacts,
    write_record,
)
from kelp.tables import MASK_SUFFIX, PROBABILITY_SUFFIX, SPREAD_SUFFIX

UTM = Georeference(CRS.from_epsg(32721), Affine(30, 0, 400_000, 0, -30, 4_272_000))


def write_map(
    folder,
    name,
    mask,
    p=None,
    spread=None,
    georeference=UTM,
    record=True,
    acquired=None,
    sensor=None,
    threshold=0.5,
    network="net",
    calibrated=True,
    scene_id=None,
):
    """Write a mask and what is given beside it; returns the mask's path."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.asarray(mask, np.uint8)
    path = folder / f"{name}{MASK_SUFFIX}"
    write_mask(path, mask, georeference)
    for suffix, values in ((PROBABILITY_SUFFIX, p), (SPREAD_SUFFIX, spread)):
        if values is not None:
            file = folder / f"{name}{suffix}"
            with RasterWriter(file, mask.shape, "float32", georeference, np.nan, {}) as out:
                out.write(0, np.asarray(values, np.float32))
    if record:
        crs, transform = georeference.crs, georeference.transform
        write_record(
            folder / f"{name}{RECORD_SUFFIX}",
            MapRecord(
                scene=SceneFacts(id=scene_id or name, sensor=sensor, acquired=acquired),
                grid=Grid(
                    shape=mask.shape,
                    crs=crs.to_string() if crs else None,
                    transform=tuple(transform)[:6] if transform else None,
                ),
                network=(NetworkFacts(name=network, sha256=f"{len(network):064x}"),),
                threshold=threshold,
                kelp_pixels=int((mask == 1).sum()),
                expected_area_m2=1.0 if calibrated else None,
            ),
        )
    return path


def random_map(seed, shape=(60, 50), share=0.35):
    """A speckled mask with unseen parts, and probabilities that go with it."""
    rng = np.random.default_rng(seed)
    mask = (rng.random(shape) < share).astype(np.uint8)
    mask[rng.random(shape) < 0.03] = 255
    p = np.where(mask == 1, rng.uniform(0.5, 1, shape), rng.uniform(0, 0.5, shape))
    p = np.where(mask == 255, np.nan, p).astype(np.float32)
    return mask, p


def day(text):
    return datetime.fromisoformat(text) if "T" in text else date.fromisoformat(text)
