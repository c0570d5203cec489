"""OpenVINO in torch's place for what takes the time: the network between resizing and sigmoid.

What comes before and after (raw numbers of five digits, statistics, resampling) stays in torch
and in float32. The package comes with `pip install "kelp-slicer[openvino]"`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import deque
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kelp.config.predict import Backend
from kelp.config.train import Precision
from kelp.errors import ConfigError, KelpError
from kelp.nn.device import compute_dtype

_PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TOLERANCES: Final = {"f32": 1e-3, "bf16": 5e-2}
"""Of a probability: far above rounding, far below a network that was translated wrongly."""


class OpenVinoBody(nn.Module):
    """A network in evaluation mode, computed by OpenVINO on the CPU.

    As many crops at a time as torch would use threads, each on a thread of its own: a crop's
    answer depends neither on its batch nor on the number of threads.

    Args:
        body: the network, channels `(n, c, h, w)` to `(n, k, h, w)`, with float32 weights.
        device: must be the CPU.
        precision: `32-true`, or one of bfloat16 where the CPU has it.

    Raises:
        ConfigError: another device.
        KelpError: the package is not installed.
    """

    def __init__(self, body: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        if device.type != "cpu":
            raise ConfigError("--backend openvino computes on the CPU; use it with --device cpu")
        _openvino()
        self._body = body
        self._precision = _PRECISIONS[compute_dtype(precision)]
        self._shape: tuple[int, ...] = ()
        self._requests: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        """Float32 `(n, c, h, w)` to float32 `(n, k, h, w)`."""
        crops = np.ascontiguousarray(x.float().numpy())
        if crops.shape[1:] != self._shape:
            self._compile(crops.shape[1:])
        answers = []
        under_way: deque[Any] = deque()
        for k, _ in enumerate(crops):
            if len(under_way) == len(self._requests):
                answers.append(_answer(under_way.popleft()))
            request = self._requests[k % len(self._requests)]
            request.start_async({0: crops[k : k + 1]})
            under_way.append(request)
        answers += map(_answer, under_way)
        return torch.from_numpy(np.stack(answers))

    def _compile(self, shape: tuple[int, ...]) -> None:
        """Translate the network for crops of `shape`, and check it by an example.

        Raises:
            KelpError: OpenVINO cannot translate it, or it would answer otherwise than torch.
        """
        openvino = _openvino()
        threads = torch.get_num_threads()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "INFERENCE_PRECISION_HINT": self._precision,
        }
        example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", enabled=False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing tells of every constant it takes
            wanted = self._body(example)
            try:
                # Its own copy of the weights: those of torch may be gone before it is.
                model = openvino.convert_model(
                    self._body, example_input=example, share_weights=False
                )
                model.reshape([1, *shape])
                compiled = openvino.Core().compile_model(model, "CPU", settings)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise KelpError(
                    f"OpenVINO cannot run this network ({reason}); use --backend torch"
                ) from error
        self._requests = [compiled.create_infer_request() for _ in range(threads)]
        self._shape = shape
        difference = (torch.sigmoid(self(example)) - torch.sigmoid(wanted)).abs().max().item()
        if not difference <= _TOLERANCES[self._precision]:
            self._shape = ()
            raise KelpError(
                f"OpenVINO answers otherwise than torch (a probability differs by {difference:.2g} "
                f"in {self._precision}); use --backend torch"
            )


def _answer(request: Any) -> NDArray[np.float32]:
    """What a request found, when it is done: `(k, h, w)`."""
    request.wait()
    answer: NDArray[np.float32] = request.get_output_tensor(0).data[0].copy()
    return answer


def runtime(backend: Backend) -> str:
    """What computes networks, with its version."""
    version = torch.__version__ if backend == "torch" else _openvino().__version__
    return f"{backend} {version}"


def _openvino() -> Any:
    # On import it would tell its maker of its use, unasked; a module that is None cannot be
    # imported, and OpenVINO then goes without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise KelpError(
            '--backend openvino needs the package openvino: pip install "kelp-slicer[openvino]"'
        ) from error
