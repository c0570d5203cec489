"""Training from the store of packed numbers ends with the weights of training from the files."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file
from slicing_world import config as slicing
from slicing_world import small_training
from world import make_world

from kelp.config import TrainConfig
from kelp.data_prep.slicing import slice_dataset
from kelp.nn.data.datamodule import read_fold
from kelp.nn.data.packing import FOLDER, pack
from kelp.nn.training.fit import train
from kelp.progress import silent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one output folder: their weights and their messages, by name."""
    root = tmp_path_factory.mktemp("runs")
    world = make_world(root, n_train=4, n_test=0, shape=(50, 70))
    table = slice_dataset(slicing(world, output_dir=root / "sahi", materialize=False)).table
    options = small_training(table, output_dir=root / "out", batch_size=8, loss="combo", seed=3)
    log = logging.getLogger("kelp")
    done = {}
    for name, changes in {
        "files": {"pack": False},
        "packed": {},
        "workers": {"num_workers": 2},
    }.items():
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())
        log.addHandler(handler)
        before = log.level
        log.setLevel(logging.INFO)
        try:
            result = train(TrainConfig(**options | changes))
        finally:
            log.removeHandler(handler)
            log.setLevel(before)
        store = sorted((root / "out" / FOLDER).glob("[!.]*"))
        done[name] = (load_file(result.bundle / "weights.safetensors"), said, store)
    return done, TrainConfig(**options | {"cv_split": 1})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_do_not_depend_on_the_store_nor_on_workers(runs):
    files, packed, workers = (weights for weights, _, _ in runs[0].values())
    assert same(files, packed)
    assert same(packed, workers)


def test_only_the_first_run_packs_whatever_the_fold(runs, caplog):
    done, other_fold = runs
    stores = [store for _, _, store in done.values()]
    assert stores[0] == []
    assert stores[1]
    assert stores[1] == stores[2]
    packing = [[line for line in said if "packing" in line] for _, said, _ in done.values()]
    assert [len(lines) for lines in packing] == [0, 1, 0]
    assert "out/packed: packing 8 images and masks, about" in packing[1][0]

    caplog.set_level("INFO", "kelp")
    fold = read_fold(other_fold)
    reader = pack(fold.train_sources + fold.val_sources, other_fold, silent)
    assert not caplog.messages
    assert {source.image for source in fold.val_sources} <= reader.images.keys()
