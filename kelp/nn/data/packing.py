"""The store of packed numbers: images and masks decoded once, for all runs of an output folder.

A store is a folder of safetensors files with some dozens of images each. An image lies there under
a key of what its pixels depend on: a changed file has another key, so that it is packed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kelp.config import TrainConfig
from kelp.errors import KelpError
from kelp.io.executors import spread
from kelp.io.files import amount, atomic, discard_partials, locked, output_folder
from kelp.nn.data.reading import Files, Packed, Place, Reader, encode
from kelp.progress import Progress
from kelp.raster import bands, validity
from kelp.raster.masks import open_dataset, raster_shape, read_mask
from kelp.raster.scene import Scene

if TYPE_CHECKING:  # it imports torch, which workers and this module do without
    from kelp.nn.data.dataset import Source

log = logging.getLogger("kelp")

FOLDER: Final = "packed"
"""Of an output folder: its store."""

_LOCK: Final = ".lock"
_SCHEMA: Final = 2  # raise it whenever a file would be read or packed otherwise than before
_FILE_BYTES: Final = 64 << 20  # what a worker holds, and what a killed one loses
_SIDECAR: Final = ".aux.xml"  # GDAL's, where a TIFF's tags may lie
_LARGEST: Final = 1 << 22  # pixels; of a larger image a window decodes few blocks only
_TRIED: Final = 4  # images that are packed for the estimate of the size
_SPARE: Final = 1.25  # the disk must have this much more room: runs write there, too


@dataclass(frozen=True)
class _Item:
    """A file to pack."""

    path: Path
    band_order: tuple[str, ...] | None
    """Of an image; `None`: the file is a mask."""
    kelp_value: int = 1
    """Of a mask: what it says where there is kelp."""
    key: str = ""

    def keyed(self) -> _Item:
        """With the key of the file as it is now."""
        sidecar = self.path.with_name(self.path.name + _SIDECAR)
        facts = (
            _SCHEMA,
            self.band_order,
            self.kelp_value,
            self.path.resolve(),
            _stamp(self.path),
            _stamp(sidecar),
        )
        return replace(self, key=_digest(map(str, facts)))


def pack(sources: Sequence[Source], config: TrainConfig, progress: Progress) -> Reader:
    """A reader of the sources' pixels, from the store of the run's output folder.

    What the store lacks is packed first. Where that cannot be done, and under `--pack False`, it
    reads the files themselves, after one line of notice. The pixels are the same.
    """
    files = Files(config.band_order, config.kelp_value)
    if not config.pack or config.fast_dev_run:  # two batches are not worth it
        return files
    folder = config.output_dir / FOLDER
    items = _items(sources, files)
    known = _places(folder)
    if all(item.key in known for item in items):
        _clean_up(folder)
    else:
        try:
            with _alone(output_folder(folder)):
                known = _places(folder)  # another process may have packed meanwhile
                missing = [item for item in items if item.key not in known]
                _fill(folder, missing, max(1, config.num_workers), progress)
        except (KelpError, OSError) as error:
            log.warning("packing stopped (%s); training reads the other files themselves", error)
        known = _places(folder)
    found = [item for item in items if item.key in known]
    return Packed(
        {item.path: known[item.key] for item in found if item.band_order is not None},
        {item.path: known[item.key] for item in found if item.band_order is None},
        files,
    )


def _items(sources: Sequence[Source], files: Files) -> list[_Item]:
    """The files of the sources, each once, in an order that does not depend on the fold."""
    images = sorted({source.image for source in sources})
    masks = sorted({source.mask for source in sources})
    items = [_Item(path, files.band_order) for path in images]
    items += [_Item(path, None, files.kelp_value) for path in masks]
    return [item.keyed() for item in items]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _digest(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


def _places(folder: Path) -> dict[str, Place]:
    """What a store holds, by key. A damaged file counts as none."""
    known: dict[str, Place] = {}
    for file in sorted(folder.glob("[!.]*.safetensors")):
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
            with safe_open(file, framework="np") as opened:
                lows, keys = json.loads(opened.metadata()["low"]), opened.keys()
            for key in keys:
                low = lows.get(key)
                known[key] = Place(file, key, None if low is None else tuple(low))
    return known


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it lasts no other process packs into the folder."""
    lock = folder / _LOCK
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError:
            log.info("%s: another process packs the images; waiting for it", folder)
            stack.enter_context(locked(lock, wait=True))
        discard_partials(folder)
        yield


def _clean_up(folder: Path) -> None:
    """Remove the lock of a process that was killed when all was packed."""
    if (folder / _LOCK).exists():
        with suppress(OSError), locked(folder / _LOCK):  # unless another process packs just now
            discard_partials(folder)


def _fill(folder: Path, items: Sequence[_Item], workers: int, progress: Progress) -> None:
    """Pack files, unless the disk has no room for them."""
    if not items:
        return
    sizes = _sizes(items, workers)
    total, free = sum(sizes), shutil.disk_usage(folder).free
    if total * _SPARE > free:
        log.warning(
            "%s: %s are free, about %s are needed to pack %d images and masks; training reads the "
            "files themselves",
            folder,
            amount(free),
            amount(int(total * _SPARE)),
            len(items),
        )
        return
    log.info(
        "%s: packing %d images and masks, about %s, for this and later runs (--pack False: "
        "read the files themselves)",
        folder,
        len(items),
        amount(total),
    )
    limit = min(_FILE_BYTES, max(1 << 20, total // (4 * workers)))
    seen = packed = 0
    for done in spread(partial(_write, folder), _groups(items, sizes, limit), workers):
        seen, packed = seen + len(done), packed + sum(done)
        progress("packing", seen, len(items))
    if packed < seen:
        log.info("%s: %d files cannot be packed and are read themselves", folder, seen - packed)


def _sizes(items: Sequence[_Item], workers: int) -> list[int]:
    """Bytes that each file takes when it is packed, from its shape and a few that are tried."""
    pixels = list(spread(_pixels, [item.path for item in items], workers))
    images = [k for k, item in enumerate(items) if item.band_order is not None and pixels[k]]
    widths = [1]
    for k in images[:: max(1, len(images) // _TRIED)]:
        packed = _packed(items[k])
        if packed is not None:
            widths.append(-(-packed[0].nbytes // pixels[k]))
    width = max(widths)
    return [
        count * (1 if item.band_order is None else width)
        for item, count in zip(items, pixels, strict=True)
    ]


def _pixels(path: Path) -> int:
    try:
        return prod(raster_shape(path))
    except KelpError:
        return 0


def _groups(items: Sequence[_Item], sizes: Sequence[int], limit: int) -> list[list[_Item]]:
    """The files that go into one file of the store, about `limit` bytes each."""
    groups: list[list[_Item]] = []
    filled = limit
    for item, size in zip(items, sizes, strict=True):
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def _write(folder: Path, items: Sequence[_Item]) -> list[bool]:
    """Make one file of the store; for each of its files, whether it could be packed."""
    arrays: dict[str, NDArray[Any]] = {}
    lows: dict[str, list[float]] = {}
    for item in items:
        packed = _packed(item)
        if packed is None or item.keyed() != item:  # changed while it was read
            continue
        arrays[item.key], low = packed
        if low is not None:
            lows[item.key] = low.ravel().tolist()
    if arrays:
        # Copied before the disk is touched: a full one is then an error, not a crash.
        content = save(arrays, {"low": json.dumps(lows)})
        with atomic(folder / f"{_digest(sorted(arrays))}.safetensors") as partial_path:
            partial_path.write_bytes(content)
    return [item.key in arrays for item in items]


def _packed(item: _Item) -> tuple[NDArray[Any], NDArray[np.float32] | None] | None:
    """The numbers of a file, see `encode`; `None` where its windows are not windows of them.

    An unreadable file is one: whoever reads it in training gets the error.
    """
    try:
        if not _can_be_packed(item.path):
            return None
        if item.band_order is None:
            return read_mask(item.path, kelp_value=item.kelp_value), None
        with Scene(item.path, item.band_order, quiet=True) as scene:
            stored, _, raw = scene.read_stored()
            qa = stored[scene.names.index("QA")] if "QA" in scene.names else None
    except KelpError:
        return None
    if qa is not None and not _means_the_same_everywhere(qa.astype(np.float32), raw[bands.QA]):
        return None
    return encode(raw)


def _can_be_packed(path: Path) -> bool:
    """Whether an image fits the memory, and its pixels are in the files that its key tells of."""
    with open_dataset(path) as dataset:
        names = {Path(name).name for name in dataset.files}
        pixels: int = dataset.height * dataset.width
    return pixels <= _LARGEST and names <= {path.name, path.name + _SIDECAR}


def _means_the_same_everywhere(stored: NDArray[np.float32], qa: NDArray[np.float32]) -> bool:
    """Whether QA is the same in each window as in the whole image.

    A window without values above 1 is not taken for QA_PIXEL. With fractions or numbers below 0,
    which no product has, that makes a difference.
    """
    low = ~(stored > 1)
    alone = validity.decode_qa(np.where(low, stored, np.float32(0)))
    return bool((alone[low] == qa[low]).all())
