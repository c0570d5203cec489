from pathlib import Path

import pytest

from kelp.tables import PROBABILITY_SUFFIX, SPREAD_SUFFIX, output_name, tile_id_of


@pytest.mark.parametrize(
    ("name", "mask", "tile_id"),
    [
        ("AB01_satellite.tif", "AB01_kelp.tif", "AB01"),
        ("AB01_satellite.TIF", "AB01_kelp.tif", "AB01"),
        ("AB01_Satellite.Tif", "AB01_kelp.tif", "AB01"),
        ("bay.tif", "bay_kelp.tif", "bay"),
        ("Bay.TIF", "Bay_kelp.tif", "Bay"),
        ("bay.v2_satellite.tif", "bay.v2_kelp.tif", "bay.v2"),
    ],
)
def test_names_of_products_do_not_depend_on_the_case_of_the_suffix(name, mask, tile_id):
    path = Path("folder") / name
    assert output_name(path) == mask
    assert output_name(path, PROBABILITY_SUFFIX) == mask.replace("_kelp", "_kelp_prob")
    assert output_name(path, SPREAD_SUFFIX) == mask.replace("_kelp", "_kelp_spread")
    assert tile_id_of(path) == tile_id
    assert tile_id_of(Path(mask)) == tile_id
    assert tile_id_of(Path(mask.replace("_kelp.tif", "_KELP_PROB.TIF"))) == tile_id
    assert tile_id_of(Path(mask.replace("_kelp.tif", "_kelp_spread.tif"))) == tile_id
