"""Networks that come with kelp: `kelp models`, and the one that prediction takes by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kelp.config import ModelsConfig
from kelp.inference.bundle import DEFAULT_NETWORK, read_spec
from kelp.inference.spec import BundleSpec
from kelp.io.location import PACKAGED, packaged_names
from kelp.progress import Progress, silent


@dataclass(frozen=True)
class PackagedNetwork:
    """A network that comes with kelp.

    Attributes:
        name: what `--run_dir` takes.
        path: its bundle.
        spec: its description.
        size: of its files, in bytes.
    """

    name: str
    path: Path
    spec: BundleSpec
    size: int


@dataclass(frozen=True)
class ModelsResult:
    """What `kelp models` found."""

    networks: tuple[PackagedNetwork, ...]

    def summary(self) -> str:
        """For each network its sensors, scores and limits."""
        return "\n\n".join(_described(network) for network in self.networks)


def models(config: ModelsConfig | None = None, progress: Progress = silent) -> ModelsResult:
    """The packaged networks, in the order of their names.

    Raises:
        BundleError: one of them is damaged.
    """
    return ModelsResult(tuple(_network(name) for name in packaged_names()))


def _network(name: str) -> PackagedNetwork:
    path = PACKAGED / name
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return PackagedNetwork(name, path, read_spec(path), size)


def _described(network: PackagedNetwork) -> str:
    spec = network.spec
    default = " (default)" if network.name == DEFAULT_NETWORK else ""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in spec.scores.items())
    lines = [
        f"{network.name}{default}: {spec.architecture}, {spec.encoder.removeprefix('tu-')}, "
        f"{network.size / 1e6:.0f} MB",
        f"  sensors: {', '.join(spec.sensors) or 'not stated'}",
        f"  bands: {', '.join(spec.bands)}; threshold {spec.threshold:g}",
        f"  scores: {scores or 'not stated'}",
        *(f"  limit: {limit}" for limit in spec.limits),
        f"  card: {network.path / 'README.md'}",
    ]
    return "\n".join(lines)
