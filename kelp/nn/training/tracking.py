"""The record of a run in MLflow, and the run's folder of plain files.

Everything of a run lies in `<output_dir>/<experiment>/<run_id>/artifacts/`. With MLflow's store
in `<output_dir>/mlflow.db` (the default) that folder *is* the run's artifact folder; a store
of `MLFLOW_TRACKING_URI` gets a copy.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import unquote, urlparse

from kelp.config import FoldConfig
from kelp.errors import InputError
from kelp.io.files import atomic, locked, output_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("kelp")

ARTIFACTS: Final = "artifacts"
STORE: Final = "mlflow.db"
STORE_VARIABLE: Final = "MLFLOW_TRACKING_URI"
Status = Literal["FINISHED", "FAILED", "KILLED"]

_CHATTY: Final = (
    "mlflow",
    "alembic",
    "sqlalchemy",
    "lightning.pytorch",
    "lightning.fabric",
    "optuna",
    "timm",
)
_WARNERS: Final = r"(lightning|mlflow|alembic|sqlalchemy|optuna)\b"
_SERVERS: Final = ("http", "https", "databricks", "databricks-uc")
_LOCK: Final = ".mlflow.lock"
_PRUNED: Final = "kelp.pruned"


class Pruned(Exception):
    """Raised by `Part.end_epoch`: the run is not worth its remaining epochs."""


def _go_on(epoch: int, metrics: Mapping[str, float]) -> None:
    pass


@dataclass(frozen=True)
class Part:
    """What a run is part of, and what the whole wants to hear of it."""

    parent: str | None
    """Id of the run that it is part of, as one of its folds or trials; none: it stands alone."""
    name: str | None
    """Of the part."""
    begin: Callable[[str], None]
    """Told the id of the run when it is opened."""
    end_epoch: Callable[[int, Mapping[str, float]], None] = _go_on
    """Told the number of each finished epoch, from 1, and its metrics. It may raise `Pruned`."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the tips, notices and warnings of other libraries from the user's screen."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=_WARNERS)
        for library in ("lightning.pytorch", "mlflow"):  # they set their loggers when imported
            importlib.import_module(library)
        loggers = [logging.getLogger(name) for name in _CHATTY]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass(frozen=True)
class Tracking:
    """One run in MLflow's store; a context that closes it.

    It is then finished, killed (after Ctrl-C, or `Pruned`), or failed (after another error).
    """

    client: MlflowClient
    run_id: str
    run_dir: Path
    """`<output_dir>/<experiment>/<run_id>`."""
    copies: bool
    """The store keeps artifacts elsewhere: it is sent a copy of each."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Pruned):
            self.prune(str(error))
        elif error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    @property
    def artifacts(self) -> Path:
        """The folder that everything of the run is written into."""
        return self.run_dir / ARTIFACTS

    def log_point(self, at: int, metrics: Mapping[str, float]) -> None:
        """Add a point to the curve of each metric, at an epoch or a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, at) for name, value in metrics.items()]
        with _going_on():
            self.client.log_batch(self.run_id, metrics=points)

    def log_files(self, *names: str) -> None:
        """Send files or folders of `artifacts` to a store that keeps them elsewhere.

        A name may lead into a folder: there the store keeps it, too.
        """
        for name in names if self.copies else ():
            path = self.artifacts / name
            with _going_on():
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), name)
                elif path.is_file():
                    folder = PurePosixPath(name).parent.as_posix()
                    self.client.log_artifact(
                        self.run_id, str(path), None if folder == "." else folder
                    )

    def prune(self, reason: str) -> None:
        """Close a run that was ended because others do better."""
        with _going_on():
            self.client.set_tag(self.run_id, _PRUNED, reason)
        self.finish("KILLED")

    def finish(self, status: Status) -> None:
        """Close the run."""
        with _going_on():
            self.client.set_terminated(self.run_id, status)


@contextmanager
def _going_on() -> Iterator[None]:
    """A store that fails during a run costs the record, not the run."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        log.warning("MLflow's store failed (%s); training continues", reason)


def start_run(config: FoldConfig, part: Part | None = None, name: str | None = None) -> Tracking:
    """Open a new run and create its folder.

    Args:
        config: of the run.
        part: what it is part of.
        name: of a run that is no part; default: MLflow's choice.

    Raises:
        InputError: the store cannot be used.
    """
    from mlflow.exceptions import MlflowException

    output_dir = output_folder(config.output_dir).resolve()
    try:
        # Of two trainings that begin at once one makes the store and the experiment.
        with locked(output_dir / _LOCK, wait=True):
            if STORE_VARIABLE not in os.environ and not (output_dir / STORE).exists():
                _make_store(output_dir / STORE)
            client = _client(output_dir)
            experiment = _experiment(client, config.experiment, output_dir)
        tags = {"mlflow.parentRunId": part.parent} if part and part.parent else {}
        run = client.create_run(experiment, tags=tags, run_name=part.name if part else name)
        _log_parameters(client, run.info.run_id, config)
    except MlflowException as error:
        raise _unusable(error) from error
    run_dir = output_dir / config.experiment / run.info.run_id
    output_folder(run_dir / ARTIFACTS)
    return _tracking(client, run.info.artifact_uri, run_dir)


def reopen_run(run_dir: Path, config: FoldConfig) -> Tracking:
    """Go on with the run of a run folder. Raises `InputError` when the store has no such run."""
    from mlflow.exceptions import MlflowException

    output_dir = config.output_dir.resolve()
    if run_dir.parent != output_dir / config.experiment:
        raise InputError(
            f"--resume_from {run_dir}: not a run of {output_dir / config.experiment}; "
            "give its own --output_dir and --experiment"
        )
    try:
        client = _client(output_dir)
        run = client.get_run(run_dir.name)
        client.update_run(run_dir.name, "RUNNING")
    except MlflowException as error:
        raise _unusable(error) from error
    return _tracking(client, run.info.artifact_uri, run_dir)


def _store_uri(output_dir: Path) -> str:
    return os.environ.get(STORE_VARIABLE) or f"sqlite:///{output_dir / STORE}"


def _make_store(path: Path) -> None:
    """MLflow fills a new store table by table, for seconds: it appears when all are there."""
    from mlflow import MlflowClient

    with atomic(path) as partial:
        client: Any = MlflowClient(tracking_uri=f"sqlite:///{partial}")
        client._tracking_client.store.engine.dispose()  # else it keeps the file open


def _client(output_dir: Path) -> MlflowClient:
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=_store_uri(output_dir))
    except Exception as error:  # MLflow's, SQLAlchemy's, or alembic's of a damaged store
        raise _unusable(error) from error


def _experiment(client: MlflowClient, name: str, output_dir: Path) -> str:
    """Id of the experiment; a new one keeps its artifacts in `<output_dir>/<name>`."""
    found = client.get_experiment_by_name(name)
    if found is None:
        is_server = urlparse(_store_uri(output_dir)).scheme in _SERVERS
        place = None if is_server else (output_dir / name).as_uri()
        return str(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _log_parameters(client: MlflowClient, run_id: str, config: FoldConfig) -> None:
    from mlflow.entities import Param

    values = config.model_dump(mode="json", exclude={"resume_from"})
    parameters = [Param(name, str(value)) for name, value in values.items()]
    client.log_batch(run_id, params=parameters)


def _tracking(client: MlflowClient, artifact_uri: str, run_dir: Path) -> Tracking:
    parts = urlparse(artifact_uri)
    is_local = parts.scheme in ("", "file")
    is_here = is_local and Path(unquote(parts.path)) == run_dir / ARTIFACTS
    if not is_here and STORE_VARIABLE not in os.environ:
        log.info(
            "%s was moved: MLflow looks for files in %s, kelp writes them to %s",
            run_dir.parents[1],
            artifact_uri,
            run_dir / ARTIFACTS,
        )
    copies = not is_here and STORE_VARIABLE in os.environ
    return Tracking(client, run_dir.name, run_dir, copies)


def _unusable(error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"MLflow's store cannot be used ({reason}); check --output_dir and MLFLOW_TRACKING_URI; "
        f"move a damaged {STORE} away"
    )
