"""What computes a network: arrays in, arrays out, whatever the runtime.

`onnx` and `trees` are here. torch is in `kelp.nn.backend`, which is imported by name when a bundle
needs it (`kelp.inference.bundle.load_bundle`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kelp.config.choices import Precision
from kelp.inference.spec import BundleSpec
from kelp.io.executors import cores

Pixels = NDArray[np.float32]
DeviceName = Literal["auto", "cpu", "cuda"]

SYMMETRIES: Final = tuple(range(8))
"""Those of the square; 0 changes nothing. Number k mirrors left-right when k >= 4, then turns by
k % 4 quarters."""

SHAPE_KEEPING: Final = tuple(k for k in SYMMETRIES if k % 2 == 0)
"""Those that leave height and width in place, for tiles that are not square."""

# Flags of /proc/cpuinfo for bfloat16 dot products: x86 (AVX-512, AMX) and ARM. Without one of
# them a CPU emulates bfloat16, which is slower than float32.
_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Processor:
    """What a network runs on; another one gives other last bits."""

    device: str
    precision: Precision
    threads: int
    versions: tuple[str, ...] = ()
    """Of what computes."""


class Backend(Protocol):
    """A network that is ready to run."""

    def probabilities(self, raw: Pixels, symmetries: Sequence[int] = (0,)) -> Pixels:
        """Raw DN `(n, 7, h, w)` to probabilities `(len(symmetries), n, h, w)`, float32.

        One answer for each of the `symmetries` in which the tiles are shown, moved back.
        """

    def allocate(self, shape: tuple[int, ...]) -> Pixels:
        """An array of zeros for a batch, in memory from which the device reads fast."""


class Net(Protocol):
    """A network as loaded, not yet bound to a device."""

    @property
    def runtime(self) -> str:
        """`torch`, `onnx` or `trees`."""

    def processor(
        self, device: DeviceName, precision: Precision | None, threads: int | None
    ) -> Processor:
        """What it would run on; a fallback is said in one line.

        Raises:
            ConfigError: there is no such device.
        """

    def on(self, processor: Processor) -> Backend:
        """The network ready to run there."""

    def described(self, spec: BundleSpec) -> Self:
        """The same weights for another tile, size or temperature.

        Raises:
            BundleError: this runtime cannot change them.
        """


def cpu_threads(wanted: int | None) -> int:
    """Threads of a network: those wanted, else OMP_NUM_THREADS, else one for each core."""
    if wanted:
        return wanted
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdecimal() and int(named):
        return int(named)
    return cores()


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has bfloat16 instructions; False where the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return not _BF16_FLAGS.isdisjoint(next(flags, "").split())


def has_gpu_driver() -> bool:
    """Whether torch may find a GPU: a driver is there. torch itself takes seconds to ask."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # AMD's
    return True


def onnx_is_faster(device: DeviceName, precision: Precision | None) -> bool:
    """Whether ONNX Runtime beats torch here: on CPUs, in float32 (docs/howto/onnx.md)."""
    if device == "cuda" or (device == "auto" and has_gpu_driver()):
        return False
    return precision == "32-true" or (precision is None and not cpu_has_bf16())


def viewed(run: Callable[[Pixels], Pixels], raw: Pixels, symmetries: Sequence[int]) -> Pixels:
    """`Backend.probabilities` of a function that knows no symmetries."""
    return np.stack([_back(run(_moved(raw, k)), k) for k in symmetries])


def _moved(x: Pixels, k: int) -> Pixels:
    flipped = x[..., ::-1] if k >= 4 else x
    return np.ascontiguousarray(np.rot90(flipped, k % 4, (-2, -1)))


def _back(x: Pixels, k: int) -> Pixels:
    turned = np.rot90(x, -(k % 4), (-2, -1))
    return turned[..., ::-1] if k >= 4 else turned
