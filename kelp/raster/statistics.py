"""The statistics file: JSON of finite numbers by channel, and what it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from kelp.errors import StatsError
from kelp.io.files import parse_json, write_json
from kelp.raster.bands import IndexInput
from kelp.raster.indices import INDICES, IndexSettings
from kelp.raster.streaming import LARGEST, ChannelStats

_ABOUT: Final = "_about"
_AGAIN: Final = "make it again with kelp stats"


@dataclass(frozen=True)
class About:
    """What a statistics file was made from."""

    cv_split: int | None
    """Fold whose training rows were seen; `None`: every training image."""
    row_count: int
    """Images or tiles."""
    mask_using_qa: bool
    """Index channels were missing where QA = 1."""
    mask_using_water_mask: bool
    """Index channels were missing on land."""
    fill_value: Literal["nan", "0"]
    """The fill rule of the training it is meant for; the numbers do not depend on it."""
    index_input: IndexInput
    """What indices were computed on."""
    version: str
    """Version of kelp."""


@dataclass(frozen=True)
class StatsFile:
    """The content of a statistics file."""

    channels: dict[str, ChannelStats]
    """Statistics by channel: bands, then indices."""
    about: About
    """Where they come from."""

    def name(self, time: datetime) -> str:
        """The file's name: when, and with what settings."""
        about = self.about
        clock = "%H-%M-%S" if os.name == "nt" else "%H:%M:%S"  # Windows takes no colons
        return (
            f"{time:%Y-%m-%dT}{time:{clock}}-stats-fill_value={about.fill_value}"
            f"-mask_using_qa={about.mask_using_qa}"
            f"-mask_using_water_mask={about.mask_using_water_mask}.json"
        )

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        channels = {name: asdict(stats) for name, stats in self.channels.items()}
        write_json(path, {_ABOUT: asdict(self.about), **channels})

    @classmethod
    def load(cls, path: Path, channels: Iterable[str] = ()) -> Self:
        """Read a file that must hold (at least) `channels`.

        Raises:
            StatsError: the file is missing or not JSON, lacks a channel, or holds something else
                than finite numbers where they belong; the message names file and channel.
        """
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StatsError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        except ValueError as error:
            raise StatsError(f"{path}: not a JSON file ({error}); {_AGAIN}") from error
        if not isinstance(content, dict):
            raise StatsError(f"{path}: not a statistics file; {_AGAIN}")
        about = _about(path, content.pop(_ABOUT, None))
        loaded = cls({name: _channel(path, name, entry) for name, entry in content.items()}, about)
        loaded.require(channels, path)
        return loaded

    def require(self, channels: Iterable[str], path: Path) -> None:
        """Raise `StatsError` unless statistics of all `channels` are there."""
        absent = [name for name in channels if name not in self.channels]
        if absent:
            raise StatsError(
                f"{path}: lacks the channel {', '.join(absent)}; {_AGAIN} --spectral_indices all"
            )

    def check(self, channels: Sequence[str], settings: IndexSettings, path: Path) -> None:
        """Raise `StatsError` unless the file fits a run with these channels and settings.

        The settings matter only to index channels: a run without any takes every file that
        holds its bands.
        """
        self.require(channels, path)
        if not any(name in INDICES for name in channels):
            return
        for name, wanted in asdict(settings).items():
            found = getattr(self.about, name)
            if found != wanted:
                raise StatsError(
                    f"{path}: was made with --{name} {found}, this run has {wanted}; "
                    f"{_AGAIN} --{name} {wanted}"
                )


def _about(path: Path, entry: Any) -> About:
    """The checked `_about` of a file."""
    kinds = {
        "cv_split": (int, type(None)),
        "row_count": (int,),
        "mask_using_qa": (bool,),
        "mask_using_water_mask": (bool,),
        "fill_value": (str,),
        "index_input": (str,),
        "version": (str,),
    }
    if not isinstance(entry, dict):
        raise StatsError(f"{path}: lacks {_ABOUT}, which says how it was made; {_AGAIN}")
    for name, kind in kinds.items():
        if name not in entry or type(entry[name]) not in kind:
            raise StatsError(f"{path}: {_ABOUT}: {name} is missing or of a wrong type; {_AGAIN}")
    return About(**{name: entry[name] for name in kinds})


def _channel(path: Path, channel: str, entry: Any) -> ChannelStats:
    """The checked statistics of one channel of a file."""
    if not isinstance(entry, dict):
        raise StatsError(f"{path}: channel {channel} is not a set of numbers; {_AGAIN}")
    values: dict[str, Any] = {}
    for field in fields(ChannelStats):
        value: Any = entry.get(field.name)
        kinds = (int,) if field.name in ("count", "nan_count") else (int, float)
        if type(value) not in kinds or not abs(value) <= LARGEST:
            raise StatsError(
                f"{path}: channel {channel}: {field.name} must be a finite number, "
                f"not {value!r}; {_AGAIN}"
            )
        values[field.name] = value
    stats = ChannelStats(**values)
    if wrong := stats.wrong():
        raise StatsError(f"{path}: channel {channel}: {wrong}; {_AGAIN}")
    return stats
