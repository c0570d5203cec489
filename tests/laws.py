"""What the tests of the laws share: a network that no symmetry spares, scenes, arrays as scenes."""

import numpy as np
import torch
from bundles import PixelBody, tiny_spec
from hypothesis import settings
from world import coast, write_tif

from kelp.config import PredictConfig
from kelp.inference.predict import predict_scenes
from kelp.nn.bundle import save_bundle
from kelp.nn.model import ARCHITECTURES, KelpNet

# The same cases in every run, on every machine.
LAWS = settings(derandomize=True, database=None)


class RampBody(PixelBody):
    """A network that looks at where a pixel lies: no symmetry leaves its answer in place."""

    def forward(self, x):
        rows, columns = (torch.linspace(-1, 1, side, dtype=x.dtype) for side in x.shape[-2:])
        return self.conv(x) + rows[:, None] + 2 * columns


def use_ramp_network(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "unet", lambda spec: RampBody(spec.channels))


def biased_bundle(folder, bias, **changes):
    """A bundle of a network like `RampBody`, whose logits are moved by `bias`."""
    spec = tiny_spec(**changes)
    net = KelpNet(spec)
    with torch.no_grad():
        net.body.conv.bias.fill_(bias)
    return save_bundle(folder, net, spec)


def write_scenes(folder, shapes, seed=5):
    rng = np.random.default_rng(seed)
    return [
        write_tif(folder / f"AA{i:06d}_satellite.tif", coast(shape, rng)[0])
        for i, shape in enumerate(shapes)
    ]


def predict(data_dir, bundles, output_dir, **options):
    """`kelp predict` on the CPU in float32, if nothing else is said."""
    config = {"data_dir": data_dir, "run_dir": bundles, "output_dir": output_dir}
    return predict_scenes(
        PredictConfig(**{"device": "cpu", "precision": "32-true", **config, **options})
    )


def predict_command(data_dir, bundle, output_dir, *more):
    """The words of `kelp predict` on the CPU in float32."""
    places = f"--data_dir={data_dir}", f"--run_dir={bundle}", f"--output_dir={output_dir}"
    return ["predict", *places, "--device=cpu", "--precision=32-true", *map(str, more)]


def rasters(folder):
    """Name and bytes of what lies under a final name."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.tif")}


class Memory:
    """An array as source and sink of the engine."""

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, pixels.shape[1:]
        self.result = np.full(self.shape, -1, np.float32)

    def read(self, tile):
        return self.pixels[:, *tile.slices]

    def write(self, y, rows):
        self.result[y : y + len(rows)] = rows

    def close(self):
        pass
