"""A bundle (or several) as the callable that the engine wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kelp.config.choices import MergeMode, Precision
from kelp.errors import BundleError
from kelp.nn import symmetry
from kelp.nn.bundle import Bundle
from kelp.nn.device import autocast
from kelp.raster.window import Shape

_MERGES: Final[dict[MergeMode, Callable[[Tensor], Tensor]]] = {
    "mean": lambda p: p.mean(dim=0),
    "max": lambda p: p.amax(dim=0),
    "min": lambda p: p.amin(dim=0),
    "gmean": lambda p: p.clamp_min(1e-12).log().mean(dim=0).exp(),
}


class Network:
    """Probabilities of batches of raw DN: `(n, 7, h, w)` to `(n, h, w)`, both float32.

    Several bundles are averaged, by `weights` if given. With `tta`, each sees the 8 symmetries of
    the square (4 where tiles are not square), merged on probabilities.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        device: torch.device,
        precision: Precision,
        tta: MergeMode | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        share = np.array(weights or [1.0] * len(bundles))
        self._weights = (share / share.sum()).tolist()
        self._nets = [bundle.on(device, precision) for bundle in bundles]
        self._device = device
        self._precision = precision
        self._tta = tta

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Room for a batch; pinned for a GPU, which then fetches it by itself."""
        pinned = self._device.type == "cuda"
        array: NDArray[np.float32] = torch.zeros(shape, pin_memory=pinned).numpy()
        return array

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict one batch."""
        batch = torch.from_numpy(raw).to(self._device, non_blocking=True)
        with torch.inference_mode(), autocast(self._precision, self._device):
            # In float64 any number of equal networks is one of them, to the last bit of float32.
            votes = [
                weight * self._views(net.probabilities, batch).double()
                for net, weight in zip(self._nets, self._weights, strict=True)
            ]
            p = torch.stack(votes).sum(dim=0)
        merged: NDArray[np.float32] = p.float().cpu().numpy()
        if not np.isfinite(merged).all():
            raise BundleError("the network answers with NaN; its training diverged, train it anew")
        return merged

    def _views(self, probabilities: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self._tta is None:
            return probabilities(batch)
        views = [
            symmetry.invert(probabilities(symmetry.apply(batch, k)), k)
            for k in _symmetries(batch.shape[-2:])
        ]
        return _MERGES[self._tta](torch.stack(views))


def passes(tile: Shape) -> int:
    """How often `tta` runs a tile through a network."""
    return len(_symmetries(tile))


def _symmetries(shape: Sequence[int]) -> tuple[int, ...]:
    return symmetry.SYMMETRIES if shape[0] == shape[1] else symmetry.SHAPE_KEEPING
