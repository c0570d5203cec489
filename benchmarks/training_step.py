"""A step of training on the CPU: what it spends its time on, and what float32 depthwise saves.

    python benchmarks/training_step.py [--encoder tu-efficientnet_b5] [--side 320] [--threads 2]

The network of `kelp train` in bfloat16 on random slices, forward and backward, with depthwise
convolutions in bfloat16 as autocast takes them and in float32 (`kelp.nn.device.Float32Depthwise`),
in turn. The share of each kind of operation is torch's profile of one step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from measuring import Row, interleaved, parser, ratio, report
from torch.profiler import ProfilerActivity, profile

from kelp.config import TrainConfig
from kelp.nn.device import Float32Depthwise
from kelp.nn.losses import LossSettings, build_loss
from kelp.nn.model import KelpNet
from kelp.nn.training.plan import network_spec
from kelp.raster.bands import BANDS
from kelp.raster.streaming import ChannelStats

SHARES = {
    "convolutions, backward %": "aten::convolution_backward",
    "forward %": "aten::mkldnn_convolution",
}
"""Operations as torch's profile calls them."""

Context = Callable[[], AbstractContextManager[object]]


class Step:
    """A step of training on random slices."""

    def __init__(self, encoder: str, side: int, batch: int) -> None:
        config = TrainConfig(
            data_dir="d",
            metadata_fp="m",
            output_dir="o",
            sahi=True,
            encoder=encoder,
            image_size=side,
        )
        alike = ChannelStats(0.0, 65_535.0, 9000.0, 3000.0, 7000.0, 20_000.0, 1, 0)
        spec = network_spec(config, (128, 128))
        spec = spec.model_copy(update={"statistics": dict.fromkeys(BANDS, alike)})
        self._net = KelpNet(spec).train()
        self._loss_of = build_loss(config.loss, LossSettings())
        self._raw = torch.rand(batch, len(BANDS), 128, 128) * 3000 + 7500
        self._target = (torch.rand(batch, 128, 128) > 0.95).to(torch.uint8)

    def run(self, depthwise: Context) -> None:
        """Forward and backward."""
        self._net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), depthwise():
            logits = self._net(self._raw)
        self._loss_of(logits, self._net.resize_target(self._target)).backward()

    def timed(self, depthwise: Context, seconds: list[float]) -> Callable[[], None]:
        """The step as something to call, which notes its CPU time."""

        def run() -> None:
            began = time.process_time()
            self.run(depthwise)
            seconds.append(time.process_time() - began)

        return run

    def shares(self, depthwise: Context) -> Row:
        """Each kind of operation, in percent of the CPU time."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.run(depthwise)
        spent = {each.key: each.self_cpu_time_total for each in found.key_averages()}
        total = sum(spent.values())
        return {title: 100 * spent.get(key, 0.0) / total for title, key in SHARES.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--encoder", default="tu-tf_efficientnet_lite0")
    options.add_argument("--side", type=int, default=224, help="of what the network sees, px")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    step = Step(given.encoder, given.side, given.batch)
    contexts = {"bfloat16": nullcontext, "float32 depthwise": Float32Depthwise}
    busy: dict[str, list[float]] = {name: [] for name in contexts}
    runs = interleaved(
        {name: step.timed(context, busy[name]) for name, context in contexts.items()},
        given.repeats,
    )
    rows: list[Row] = [
        {
            "step": name,
            "ms a sample": statistics.median(runs[name]) / given.batch * 1e3,
            "CPU ms a sample": statistics.median(busy[name][1:]) / given.batch * 1e3,
            **step.shares(context),
        }
        for name, context in contexts.items()
    ]
    by_clock = ratio(runs["bfloat16"], runs["float32 depthwise"])
    by_cpu = ratio(busy["bfloat16"][1:], busy["float32 depthwise"][1:])
    verdict = (
        f"samples a second: {by_clock:.2f} times, by the CPU's seconds {by_cpu:.2f} (target 1.5)"
    )
    report("A step of training", rows, [verdict], given.json)


if __name__ == "__main__":
    main()
