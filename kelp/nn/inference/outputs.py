"""What becomes of a scene's probabilities: one threshold, then files that appear complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kelp.bands import MASK_NODATA
from kelp.errors import KelpError
from kelp.grid import Shape
from kelp.manifest import MASK_SUFFIX, PROBABILITY_SUFFIX
from kelp.merge import to_mask
from kelp.raster import Georeference, RasterWriter


def probability_path(mask: Path) -> Path:
    """The probability raster that belongs to a mask."""
    return mask.with_name(mask.name.removesuffix(MASK_SUFFIX) + PROBABILITY_SUFFIX)


@dataclass
class Outputs:
    """Sink of one scene: its mask and, on request, its probabilities."""

    writers: list[RasterWriter]
    threshold: float
    _open: list[RasterWriter] = field(default_factory=list, init=False)

    @classmethod
    def of(
        cls,
        shape: Shape,
        place: Georeference,
        mask: Path,
        threshold: float,
        tags: Mapping[str, str],
        with_probabilities: bool = False,
    ) -> Outputs:
        """The mask, and on request the probabilities beside it, of a scene."""
        writers = [RasterWriter(mask, shape, "uint8", place, MASK_NODATA, tags)]
        if with_probabilities:
            path = probability_path(mask)
            writers.append(RasterWriter(path, shape, "float32", place, float("nan"), tags))
        return cls(writers, threshold)

    def write(self, y: int, rows: NDArray[np.float32]) -> None:
        """Write rows `(n, width)` of probabilities from row `y` on."""
        if not self._open:
            for writer in self.writers:
                self._open.append(writer.__enter__())
        self._open[0].write(y, to_mask(rows, self.threshold))
        for writer in self._open[1:]:
            writer.write(y, rows)

    def close(self) -> None:
        """Finish the files; the mask last: it is what marks a scene as finished."""
        if len(self.writers) == 1:  # probabilities of an earlier run would not belong to it
            probability_path(self.writers[0].path).unlink(missing_ok=True)
        while self._open:
            self._open.pop().__exit__(None, None, None)

    def abandon(self) -> None:
        """Remove what was begun and not closed."""
        given_up = KelpError("given up")
        while self._open:
            self._open.pop().__exit__(KelpError, given_up, None)
