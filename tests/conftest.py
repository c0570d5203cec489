"""Fixtures for the tests of several laws. Torch is slow to load: only when one is asked for."""

import os
import shutil
import signal

import pytest
from hypothesis import settings

# `make test` runs two files at a time: networks that take all cores would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is slow: time alone fails no property test.
settings.register_profile("kelp", deadline=None)
settings.load_profile("kelp")

# A background job of a shell inherits an ignored Ctrl-C, and would hand that on to the programs
# that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """Law 5 is about a fixed number of threads, and the other tests are too small for more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ramp(monkeypatch):
    from laws import use_ramp_network

    use_ramp_network(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four images to train on and two to predict, of 50 x 70 px."""
    from world import make_world

    return make_world(tmp_path_factory.mktemp("world"), n_train=4, shape=(50, 70))


@pytest.fixture
def labelled(tmp_path):
    """Twelve scenes of six places with their truths, and the table that says so."""
    import numpy as np
    import pandas as pd
    from world import coast, write_tif

    from kelp.raster.writer import write_mask

    rng = np.random.default_rng(5)
    rows = []
    for k in range(12):
        image, mask = coast((100, 90), rng)
        write_tif(tmp_path / "images" / f"K{k:02d}_satellite.tif", image)
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_mask(tmp_path / "masks" / f"K{k:02d}_kelp.tif", mask)
        rows.append({"tile_id": f"K{k:02d}", "aoi_id": f"place{k // 2}"})
    pd.DataFrame(rows).to_parquet(tmp_path / "places.parquet")
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store without runs: MLflow needs seconds to make one."""
    from bundles import mlflow_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client(path.parent).search_experiments()
    return path


@pytest.fixture(scope="session")
def new_store(empty_store):
    """Makes folders that hold a store without runs."""

    def make(folder):
        folder.mkdir()
        shutil.copy(empty_store, folder)
        return folder

    return make
