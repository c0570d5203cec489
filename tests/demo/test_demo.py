"""The demo, with a third of its training: every step of the road once, and what it must reach."""

import json

import pandas as pd
import pytest

from kelp.config import DemoConfig
from kelp.demo.run import demo


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path):
    config = DemoConfig(
        output_dir=tmp_path,
        places=16,
        dates=2,
        test=4,
        epochs=3,
        samples_per_epoch=112,
    )
    result = demo(config)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["pooled_dice"] == result.pooled_dice
    assert scores["test"]["images"] == 4
    assert result.pooled_dice > 0.6  # a network that collapsed or paints a scene over has less
    assert scores["packaged_pooled_dice"] == result.packaged_dice
    assert result.packaged_dice > 0.7  # of the network that comes with kelp
    report = result.report.read_text()
    assert "simulated" in report.lower()
    assert report.count("data:image/png;base64,") in (5, 6)  # real, curves, scenes, series
    coast = tmp_path / "coast"
    for name in ("beds.gpkg", "areas.csv", "map.html", "series/stations.nc", "series/grid.nc"):
        assert (coast / name).is_file() or name == "series/grid.nc"
    quarters = pd.read_parquet(coast / "series" / "quarters.parquet")
    unseen = quarters[(quarters["year"] == 2022) & (quarters["quarter"] == 2)]
    assert unseen["mean_area_m2"].isna().all()
    assert 'href="coast/map.html"' in report
    names = {path.name for path in tmp_path.iterdir()}
    assert {"submission.tar", "mlruns", "data", "predictions", "kelp-demo.yaml"} <= names
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    # A rival at equal compute, which was shown whole images.
    ways = {way["name"].split(":")[0] for way in comparison["ways"]}
    assert ways == {"sliced", "whole"}
    assert comparison["advice"]["text"].split(":")[0] in report
    assert 'href="comparison/report.html"' in report
