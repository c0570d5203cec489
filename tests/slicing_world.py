"""What the tests of slicing share."""

from __future__ import annotations

import numpy as np
import pandas as pd
from world import write_tif

from kelp.config import SliceConfig


def config(world, **options):
    values = {
        "data_dir": world.train_dir,
        "metadata_fp": world.table,
        "workers": 1,
        "image_size": 32,
        "output_dir": world.data_dir.parent / "sahi",
    }
    return SliceConfig(**(values | options))


def one_image(root, image, mask=None, **profile):
    """A folder with one training image, and its table."""
    if mask is None:
        mask = np.zeros(image.shape[1:], np.uint8)
    write_tif(root / "images" / "A_satellite.tif", image, **profile)
    place = {key: profile[key] for key in ("crs", "transform") if key in profile}
    write_tif(root / "masks" / "A_kelp.tif", mask[np.newaxis], **place)
    table = root / "table.parquet"
    pd.DataFrame({"tile_id": ["A"], "original_split": ["train"]}).to_parquet(table)
    return {"data_dir": root, "metadata_fp": table, "output_dir": root / "out", "workers": 1}


def small_training(table, **changes):
    """Options of `kelp train` on tiles, for a network of 64 px that trains in a second."""
    values = {
        "data_dir": table.parent,
        "metadata_fp": table,
        "sahi": True,
        "num_workers": 0,
        "batch_size": 4,
        "image_size": 64,
        "precision": "32-true",
        "encoder": "tu-test_resnet",
        "decoder_channels": (16, 8, 8, 4),
        "pretrained": False,
        "epochs": 1,
        "plot_n_batches": 0,
        "min_dice": 0,  # the smallest of networks learns little in some epochs
    }
    return values | changes
