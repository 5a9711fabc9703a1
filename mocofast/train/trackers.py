"""Where the metrics of a run go besides metrics.jsonl (train.log_to).

TensorBoard, W&B, MLflow, Comet and trackio. A tracker that fails says so once, and the run goes on
without it. The id of a remote run is kept in the run folder, so a continued run continues the same
remote run. The packages read their own variables (WANDB_MODE=offline, WANDB_PROJECT,
MLFLOW_TRACKING_URI, COMET_START_ONLINE=false, TRACKIO_DIR).
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mocofast import files
from mocofast.config import TRACKERS
from mocofast.errors import describe_error
from mocofast.train.log_files import Board

log = logging.getLogger("mocofast")

IDS = "trackers.json"  # {tracker: id of the remote run}
PROJECT = "mocofast"


class Tracker(Protocol):
    """A place for metrics. Every method may raise any exception."""

    id: str  # of the remote run, "" for none

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds the metrics of a step."""
        ...

    def close(self) -> None:
        """Sends what waits, and ends the remote run."""
        ...


class WandB:
    """Weights & Biases. WANDB_MODE=offline writes to the run folder, for `wandb sync`."""

    def __init__(self, path: Path, config: Mapping[str, Any], id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=path.name,
            dir=str(path),
            config=dict(config),
            id=id or None,
            resume="allow",
        )
        self.id = str(self._run.id)

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, on the server or in the folder of MLFLOW_TRACKING_URI."""

    def __init__(self, path: Path, config: Mapping[str, Any], id: str) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        if id:
            self._client.update_run(id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            id = self._client.create_run(experiment, run_name=path.name).info.run_id
            options = [Param(name, value) for name, value in _options(config).items()]
            for first in range(0, len(options), 100):  # the most that a call takes
                self._client.log_batch(id, params=options[first : first + 100])
        self.id = id

    def add(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class Comet:
    """Comet. COMET_START_ONLINE=false writes to the run folder, for `comet upload`."""

    def __init__(self, path: Path, config: Mapping[str, Any], id: str) -> None:
        import comet_ml

        self._experiment = comet_ml.start(
            project_name=os.environ.get("COMET_PROJECT_NAME", PROJECT),
            experiment_key=id or None,
            mode="get" if id else "create",
            experiment_config=comet_ml.ExperimentConfig(
                name=path.name,
                offline_directory=str(path / "comet"),
                log_code=False,
                log_git_patch=False,
                parse_args=False,
                auto_output_logging=False,
            ),
        )
        if not id:
            self._experiment.log_parameters(_options(config))
        self.id = str(self._experiment.get_key())

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._experiment.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._experiment.end()


class Trackio:
    """trackio, in the folder of TRACKIO_DIR, or in the Space of TRACKIO_SPACE_ID."""

    def __init__(self, path: Path, config: Mapping[str, Any], id: str) -> None:
        import trackio

        self.id = id or f"{path.name}-{uuid.uuid4().hex[:8]}"  # trackio continues a run by its name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        options = _options(config)
        self._run = trackio.init(project, self.id, config=options, resume="allow", embed=False)

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _options(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns {"group.name": value} of a run's options."""
    return {
        f"{group}.{key}": str(value)
        for group, values in config.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }


_REMOTE: dict[str, Callable[[Path, Mapping[str, Any], str], Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "comet": Comet,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of a run, none of which ends the run."""

    def __init__(
        self,
        names: Sequence[str],
        path: Path,
        config: Mapping[str, Any],
        resumed_step: int | None,
    ) -> None:
        """Opens the trackers.

        names: of TRACKERS. path: the run folder. config: the options, {group: {name: value}}.
        resumed_step: the step to continue from, or None for a new run, which has no remote run yet.
        """
        self._board: Board | None = None
        if TRACKERS[0] in names:
            self._board = Board(path, None if resumed_step is None else resumed_step + 1)
        known = _read(path / IDS) if resumed_step is not None else {}
        self._remote: dict[str, Tracker] = {}
        for name in [name for name in _REMOTE if name in names]:
            try:
                self._remote[name] = _REMOTE[name](path, config, known.get(name, ""))
            except ImportError:
                log.warning("no metrics go to %s: pip install 'mocofast[%s]'", name, name)
            except Exception as error:  # of a network, a server, a login
                log.warning("no metrics go to %s: %s", name, describe_error(error))
        ids = known | {name: tracker.id for name, tracker in self._remote.items()}
        if ids != known or (resumed_step is None and (path / IDS).exists()):
            with files.atomic_write(path / IDS) as written:
                written.write_text(json.dumps(ids), encoding="utf-8")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds the metrics of a step to all trackers."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add(name, value, step)
        for name in [*self._remote]:
            self._call(name, lambda tracker: tracker.add(values, step))

    def close(self) -> None:
        """Closes all trackers."""
        if self._board is not None:
            self._board.close()
        for name in [*self._remote]:
            self._call(name, lambda tracker: tracker.close())

    def _call(self, name: str, function: Callable[[Tracker], None]) -> None:
        try:
            function(self._remote[name])
        except Exception as error:
            del self._remote[name]
            log.warning("no further metrics go to %s: %s", name, describe_error(error))


def _read(path: Path) -> dict[str, str]:
    """Returns the ids of remote runs. {} where there are none, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
