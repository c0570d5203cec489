"""A bundle (or several) as the callable that the engine wants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kelp.config.predict import MergeMode
from kelp.config.train import Precision
from kelp.nn import symmetry
from kelp.nn.bundle import Bundle
from kelp.nn.device import autocast, weights_dtype
from kelp.nn.model import KelpNet

_MERGES: Final[dict[MergeMode, Callable[[Tensor], Tensor]]] = {
    "mean": lambda p: p.mean(dim=0),
    "max": lambda p: p.amax(dim=0),
    "min": lambda p: p.amin(dim=0),
    "gmean": lambda p: p.clamp_min(1e-12).log().mean(dim=0).exp(),
}


class Network:
    """Probabilities of batches of raw DN: `(n, 7, h, w)` to `(n, h, w)`, both float32.

    Several bundles are averaged. With `tta`, each sees the 8 symmetries of the square (4 where
    tiles are not square), merged on probabilities.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        device: torch.device,
        precision: Precision,
        tta: MergeMode | None = None,
    ) -> None:
        self._nets = [_on(bundle.net, device, weights_dtype(precision)) for bundle in bundles]
        self._device = device
        self._precision = precision
        self._tta = tta

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict one batch."""
        batch = torch.from_numpy(raw).to(self._device)
        with torch.inference_mode(), autocast(self._precision, self._device):
            p = torch.stack([self._views(net.probabilities, batch) for net in self._nets]).mean(0)
        merged: NDArray[np.float32] = p.float().cpu().numpy()
        return merged

    def _views(self, probabilities: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self._tta is None:
            return probabilities(batch)
        square = batch.shape[-1] == batch.shape[-2]
        views = [
            symmetry.invert(probabilities(symmetry.apply(batch, k)), k)
            for k in (symmetry.SYMMETRIES if square else symmetry.SHAPE_KEEPING)
        ]
        return _MERGES[self._tta](torch.stack(views))


def _on(net: KelpNet, device: torch.device, dtype: torch.dtype) -> KelpNet:
    """The network on `device`, its weights in `dtype`; the caller's own keeps its type."""
    if next(net.body.parameters()).dtype != dtype:
        net = copy.deepcopy(net)
        net.body.to(dtype)
    return net.to(device)
