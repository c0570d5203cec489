"""Maps as an xarray dataset: right values, and only what is asked for is read."""

import numpy as np
import pytest
from affine import Affine
from coasts import UTM, random_map, write_map
from pyproj import CRS

import kelp
from kelp.errors import InputError
from kelp.products.maps import Map
from kelp.raster.masks import Georeference


@pytest.fixture
def maps(tmp_path):
    mask, p = random_map(0, (20, 30))
    below = Georeference(UTM.crs, UTM.transform @ Affine.translation(5, 10))
    write_map(tmp_path, "B", mask, p, acquired="2023-05-01", sensor="landsat-8")
    moment = "2022-05-01T13:30:00+00:00"
    write_map(tmp_path, "A", mask[::-1], p[::-1], acquired=moment, georeference=below)
    return tmp_path, mask, p


def test_values(maps):
    folder, mask, p = maps
    data = kelp.to_xarray(folder)
    assert data["kelp"].dims == ("time", "y", "x")
    assert data["kelp"].shape == (2, 30, 35)
    assert data["scene_id"].values.tolist() == ["A", "B"]
    moments = np.array(["2022-05-01T13:30:00", "2023-05-01T00:00:00"], "datetime64[ns]")
    np.testing.assert_array_equal(data["time"], moments)
    b = data.isel(time=1, y=slice(0, 20), x=slice(0, 30))
    truth = np.where(mask == 255, np.nan, mask)
    np.testing.assert_array_equal(b["kelp"], truth)
    np.testing.assert_array_equal(b["probability"], p)
    a = data.sel(time="2022").isel(time=0)["kelp"]
    np.testing.assert_array_equal(a[10:, 5:], truth[::-1])
    assert np.isnan(a[:10]).all()
    assert np.isnan(a[:, :5]).all()
    at = data["kelp"].sel(time="2023-05-01").sel(x=400_000 + 45, y=4_272_000 - 75)
    np.testing.assert_array_equal(at, truth[2, 1])
    assert CRS.from_wkt(data["spatial_ref"].attrs["crs_wkt"]).to_epsg() == 32721
    assert data["kelp"].isel(time=[1, 0], y=[3, 1, 2], x=-1).shape == (2, 3)


def test_only_windows_are_read(maps, monkeypatch):
    sizes = []
    read = Map.read

    def counted(self, tile):
        sizes.append((tile.height, tile.width))
        return read(self, tile)

    monkeypatch.setattr(Map, "read", counted)
    data = kelp.to_xarray(maps[0])
    assert sizes == []
    data["kelp"].isel(time=1, y=slice(4, 8), x=slice(2, 5)).load()
    assert sizes == [(4, 3)]


def test_files_without_probabilities_or_dates(tmp_path):
    one = write_map(tmp_path, "A", np.eye(4), record=False)
    two = write_map(tmp_path, "B", np.eye(4), np.eye(4), acquired="2020-01-01")
    data = kelp.to_xarray([one, two])
    assert list(data.data_vars) == ["kelp"]
    assert np.isnat(data["time"].values[1])
    assert data["kelp"].sum() == 8


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="no map was named"):
        kelp.to_xarray([])
    one = write_map(tmp_path, "A", np.eye(4))
    half = Georeference(UTM.crs, UTM.transform @ Affine.translation(0.5, 0))
    two = write_map(tmp_path, "B", np.eye(4), georeference=half)
    with pytest.raises(InputError, match="maps of one grid"):
        kelp.to_xarray([one, two])
