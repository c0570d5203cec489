"""What a sweep leaves beside its runs: table, best configuration, picture, summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kelp.config import TrainConfig
from kelp.io.files import atomic, write_text
from kelp.nn.search.picture import draw
from kelp.nn.search.space import Base, Space

if TYPE_CHECKING:
    from kelp.nn.search.study import Importance, Outcome

TABLE: Final = "trials.csv"
BEST: Final = "best.yaml"
PICTURE: Final = "importances.png"
SUMMARY: Final = "summary.txt"
FILES: Final = (TABLE, BEST, PICTURE, SUMMARY)


@dataclass(frozen=True)
class Standing:
    """How a sweep stands."""

    folder: Path
    base: Base
    space: Space
    wanted: int
    """Finished trials, in the end."""
    outcomes: Sequence[Outcome]
    importances: Mapping[str, Importance] | None
    """`None` where they cannot be told."""

    @property
    def config(self) -> TrainConfig:
        """What all trials share."""
        return self.base.configured({})

    @property
    def best(self) -> Outcome | None:
        """The best complete trial; of equals the earlier."""
        sign = 1 if self.config.monitor_mode == "max" else -1
        known = [(sign * t.value, -t.number, t) for t in self.of("complete") if t.value is not None]
        return max(known)[-1] if known else None

    def of(self, state: str) -> list[Outcome]:
        """Trials of a state."""
        return [outcome for outcome in self.outcomes if outcome.state == state]

    def text(self) -> str:
        """The summary: counts, the best, importances, and what the best score is worth."""
        complete, pruned, failed = (len(self.of(s)) for s in ("complete", "pruned", "failed"))
        stopped = f"; {failed} failed, which do not count" if failed else ""
        lines = [
            f"{complete + pruned} of {self.wanted} trials: {complete} complete, {pruned} pruned"
            f"{stopped}; all of them in {self.folder / TABLE}"
        ]
        best = self.best
        if best is None:
            return "\n".join([*lines, "no trial is complete, so there is no best one"])
        lines.append(f"best: trial {best.number}, {self._score(best)}, run {best.run}")
        lines += [f"  {name}: {value}" for name, value in best.params.items()]
        lines.append(self._importances())
        lines.append(
            f"The best of {complete} flatters: fold {self.config.cv_split}, which it is scored on, "
            "also picked it. Judge it on another one: "
            f"kelp train --config {self.folder / BEST} --cv_split K"
        )
        return "\n".join(lines)

    def best_yaml(self) -> str | None:
        """A config file of `kelp train`; `None` while no trial is complete."""
        best = self.best
        if best is None:
            return None
        config = self.base.again(best.params)
        return (
            f"# kelp train --config {BEST}\n"
            f"# Trial {best.number} (run {best.run}): {self._score(best)} on fold "
            f"{config.cv_split}, the best of {len(self.of('complete'))}.\n{config.to_yaml()}"
        )

    def table(self) -> str:
        """All trials as CSV; values as numbers with all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = list(self.space.options)
        writer.writerow(["trial", "state", "value", *names, "run_id", "seconds", "reason"])
        for one in self.outcomes:
            seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
            params = [one.params.get(name) for name in names]
            writer.writerow(
                [one.number, one.state, one.value, *params, one.run, seconds, one.reason]
            )
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write all files, each complete or not at all."""
        write_text(folder / TABLE, self.table())
        best = self.best_yaml()
        if best is not None:
            write_text(folder / BEST, best)
        png = draw(
            self.outcomes,
            self.config.monitor_metric,
            self.config.monitor_mode,
            self.importances,
            self._why_not(),
        )
        with atomic(folder / PICTURE) as partial:
            partial.write_bytes(png)
        write_text(folder / SUMMARY, self.text() + "\n")

    def _score(self, outcome: Outcome) -> str:
        return f"{self.config.monitor_metric} {outcome.value:.4f}"

    def _importances(self) -> str:
        if self.importances is None:
            return f"importances: {self._why_not()}"
        told = (
            f"{name} {one.share:.2f} ({one.chance:.2f})" for name, one in self.importances.items()
        )
        return f"importances (in brackets: by chance alone): {', '.join(told)}"

    def _why_not(self) -> str:
        """Why there are no importances."""
        from kelp.nn.search.study import ENOUGH

        if len(self.space.options) < 2:
            return f"only {next(iter(self.space.options))} was searched"
        complete = len(self.of("complete"))
        if complete < ENOUGH:
            return f"told from {ENOUGH} complete trials on, now {complete}"
        return "all complete trials score the same"
