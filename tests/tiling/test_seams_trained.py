"""The pass mark of the seam score, on a network that was trained for half a minute.

Untrained networks, and networks of one pixel, do not show what merging has to hide: that a tile's
rim knows less than its middle.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import tiny_spec

import kelp
from kelp.inference.bundle import Bundle
from kelp.nn import symmetry
from kelp.nn.backend import TorchNet
from kelp.nn.losses import build_loss
from kelp.nn.model import KelpNet
from kelp.raster.validity import canonical
from kelp.simulation.scene import simulate_scene
from kelp.tiling.grid import TileGrid
from kelp.tiling.seams import Steps, steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SEED, TILE, SIDE, STEPS, BATCH, LR = 1000, 64, 192, 300, 16, 5e-3
PASS_MARK = 1.5
"""Eight networks of other seeds, decoders and steps, none trained for long, scored 0.89 to 1.36;
with a planted fault all of them scored 4 to 29. Four were asked without any tile, too, and scored
0.99 to 1.12: so far from 1 is what the network draws itself, and what three scenes leave to chance.
"""


def crops(rng, raw, truth):
    """A batch: every other crop holds a pixel of kelp."""
    kelp_pixels = np.argwhere(truth == 1)
    batch = []
    for number in range(BATCH):
        if number % 2:
            scene, *corner = kelp_pixels[rng.integers(len(kelp_pixels))]
            corner = np.array(corner) - rng.integers(TILE, size=2)
        else:
            scene, corner = rng.integers(len(raw)), rng.integers(SIDE - TILE, size=2)
        y, x = np.clip(corner, 0, SIDE - TILE)
        here = slice(y, y + TILE), slice(x, x + TILE)
        batch.append((raw[scene][:, *here], truth[scene][here]))
    turn = int(rng.integers(len(symmetry.SYMMETRIES)))
    return (
        symmetry.apply(torch.from_numpy(np.stack(part)), turn) for part in zip(*batch, strict=True)
    )


@pytest.fixture(scope="module")
def bundle(one_thread):
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    scenes = [simulate_scene(SEED + number, SIDE, SIDE) for number in range(8)]
    raw = np.stack([canonical(scene.pixels) for scene in scenes])
    truth = np.stack([scene.truth for scene in scenes])
    spec = tiny_spec(
        encoder="tu-mobilenetv3_small_050",
        decoder_channels=(64, 32, 16, 16, 8),
        image_size=TILE,
        tile_size=(TILE, TILE),
        resize_strategy="pad",
    )
    net, loss = KelpNet(spec).train(), build_loss("combo")
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS)
    for _ in range(STEPS):
        x, target = crops(rng, raw, truth)
        loss(net(x), net.resize_target(target)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Bundle(Path(), spec, TorchNet(net.eval()))


@pytest.fixture(scope="module")
def unseen():
    return [simulate_scene(SEED + 500 + number, 350, 350) for number in range(3)]


def predicted(bundle, scenes, blend, overlap):
    """Maps of the scenes, and their seam score."""
    maps = [
        kelp.predict_array(
            bundle, scene.pixels, blend=blend, overlap=overlap, device="cpu", precision="32-true"
        )
        for scene in scenes
    ]
    grid = TileGrid((350, 350), TILE, overlap)
    sums = np.sum([steps(p, grid) for p in maps], axis=0)
    return maps, Steps(*sums).score


def test_the_default_leaves_no_seam(bundle, unseen):
    maps, score = predicted(bundle, unseen, "hann", TILE // 2)
    assert 1 / PASS_MARK < score < PASS_MARK
    p, truth = np.stack(maps), np.stack([scene.truth for scene in unseen])
    seen = np.isfinite(p)
    # It has learnt what kelp is, on coasts that it never saw (this one: 140 times).
    assert p[seen & (truth == 1)].mean() > 10 * p[seen & (truth == 0)].mean()


@pytest.mark.parametrize(("blend", "overlap"), [("mean", TILE // 2), ("hann", 0), ("mean", 0)])
def test_planted_faults_fail_the_pass_mark(bundle, unseen, blend, overlap):
    assert predicted(bundle, unseen, blend, overlap)[1] > 2 * PASS_MARK
