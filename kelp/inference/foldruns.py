"""The runs of a cross-validation: one parent folder that says which run is which fold's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

from kelp.errors import BundleError
from kelp.io.files import parse_json, write_json

FOLDS_FILE: Final = "folds.json"
_ARTIFACTS: Final = "artifacts"


@dataclass
class FoldRun:
    """The run of one fold.

    Attributes:
        run: its id, which is the name of its folder beside the parent's.
        scores: of its best epoch; `None` while it is not finished.
    """

    run: str
    scores: dict[str, float] | None = None


@dataclass
class FoldRuns:
    """The runs of all folds, by number, as `<parent>/artifacts/folds.json` keeps them."""

    folds: list[int]
    runs: dict[int, FoldRun] = field(default_factory=dict)

    @classmethod
    def read(cls, parent: Path) -> FoldRuns | None:
        """Those of a parent folder; `None` where it is none."""
        path = parent / _ARTIFACTS / FOLDS_FILE
        if not path.is_file():
            return None
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            runs = {int(k): FoldRun(**run) for k, run in values["runs"].items()}
            return cls([int(k) for k in values["folds"]], runs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: damaged; name the runs of the folds themselves") from error

    def write(self, parent: Path) -> None:
        """Keep them, with the summary."""
        runs = {str(k): asdict(run) for k, run in sorted(self.runs.items())}
        content: dict[str, Any] = {"folds": self.folds, "runs": runs, "summary": self.summary()}
        write_json(parent / _ARTIFACTS / FOLDS_FILE, content)

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the folds that are still to be trained."""
        done = {k for k, run in self.runs.items() if run.scores is not None}
        return [k for k in self.folds if k not in done]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and standard deviation of each score over the finished folds."""
        known = [run.scores for _, run in sorted(self.runs.items()) if run.scores is not None]
        names = set.intersection(*map(set, known)) if known else set()
        columns = {name: [scores[name] for scores in known] for name in sorted(names)}
        return {
            name: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}
            for name, values in columns.items()
        }


def runs_of(paths: Iterable[Path]) -> list[Path]:
    """Run folders; where one is the parent of a cross-validation, the runs of all its folds.

    Raises:
        BundleError: a fold is not finished.
    """
    found: list[Path] = []
    for path in paths:
        path = path.parent if path.name == _ARTIFACTS else path
        folds = FoldRuns.read(path)
        if folds is None:
            found.append(path)
            continue
        if folds.unfinished:
            raise BundleError(
                f"{path}: fold {folds.unfinished[0]} is not finished; go on with kelp train "
                f"--resume_from {path}, or name the runs of finished folds"
            )
        found += [path.resolve().parent / run.run for _, run in sorted(folds.runs.items())]
    return found
