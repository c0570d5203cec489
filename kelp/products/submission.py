"""The competition's submission: one tar of small masks, the same bytes whenever it is made."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rasterio.io import MemoryFile

from kelp.config.predict import SubmitConfig
from kelp.errors import InputError
from kelp.io.files import atomic, input_folder, output_folder
from kelp.progress import Progress, silent
from kelp.raster.masks import read_mask, suppress_georef_warnings
from kelp.tables import MASK_SUFFIX, tile_id_of

ARCHIVE: Final = "submission.tar"
SIDE: Final = 350
"""Height and width of a competition image in pixels."""

_LONGEST_NAME: Final = 100  # bytes of a member's name in a ustar archive


@dataclass(frozen=True)
class SubmissionResult:
    """A written submission: the archive, its number of masks, and its number of kelp pixels."""

    path: Path
    masks: int
    kelp_pixels: int
    not_observed_pixels: int

    def summary(self) -> str:
        """One line for the terminal."""
        unseen = (
            f", {self.not_observed_pixels:,} not observed pixels became 0"
            if self.not_observed_pixels
            else ""
        )
        return f"wrote {self.path}: {self.masks} masks, {self.kelp_pixels:,} kelp pixels{unseen}"


def submit(config: SubmitConfig, progress: Progress = silent) -> SubmissionResult:
    """Write `<output_dir>/submission.tar` from a folder of `<tile_id>_kelp.tif` masks."""
    masks = input_folder(config.predictions_dir, f"*{MASK_SUFFIX}")
    folder = output_folder(config.output_dir)
    result = write_submission(masks, folder / ARCHIVE, progress)
    config.record(folder)
    return result


def write_submission(
    masks: Sequence[Path], output: Path, progress: Progress = silent
) -> SubmissionResult:
    """Write masks as a submission archive, sorted by name whatever the order of `masks`.

    Not observed (255) becomes 0: only here, and only because the competition knows 0 and 1.
    The same masks give the same bytes on any day and under any user.

    Raises:
        InputError: a mask is not 350 x 350, is unreadable, or two have the same tile id.
    """
    members = _members(masks)
    kelp = unseen = 0
    with atomic(output) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for done, (name, path) in enumerate(members.items(), 1):
            mask = read_mask(path)
            if mask.shape != (SIDE, SIDE):
                raise InputError(
                    f"{path} has {mask.shape[0]} x {mask.shape[1]} pixels; a submission holds "
                    f"masks of {SIDE} x {SIDE}: leave this file out of the folder"
                )
            _add(tar, name, mask_bytes(mask))
            kelp += int((mask == 1).sum())
            unseen += int((mask > 1).sum())
            progress("submission", done, len(members))
    return SubmissionResult(output, len(members), kelp, unseen)


def mask_bytes(mask: NDArray[np.uint8]) -> bytes:
    """A mask as the competition stores it: int8 GeoTIFF, LZW, one band, without georeference.

    `mask` has shape `(height, width)`; 1 is kelp, everything else becomes 0. The layout is that
    of the competition's own labels, byte for byte.
    """
    kelp = (mask == 1).astype(np.int8)
    height, width = kelp.shape
    with suppress_georef_warnings(), MemoryFile() as file:
        with file.open(
            driver="GTiff", height=height, width=width, count=1, dtype="int8", compress="lzw"
        ) as dataset:
            dataset.write(kelp, 1)
        return bytes(file.read())


def _members(masks: Sequence[Path]) -> dict[str, Path]:
    """Files by the name of their archive member, sorted by it."""
    members: dict[str, Path] = {}
    for path in masks:
        name = tile_id_of(path) + MASK_SUFFIX
        if name in members:
            raise InputError(f"{path} and {members[name]} are masks of one image; keep one of them")
        if len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"{path}: the name is too long for an archive; shorten the tile id")
        members[name] = path
    if not members:
        raise InputError("a submission needs at least one mask; predict the test images first")
    return dict(sorted(members.items()))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A fresh TarInfo has time 0, user 0 and mode 644: nothing of this machine gets in.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
