"""Metrics reach the trackers, a continued run continues the remote run, and no error ends it."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mocofast import settings
from mocofast.config import ConfigError
from mocofast.train import trackers
from mocofast.train.run_folder import RunFolder
from mocofast.train.trackers import IDS


class Recorder:
    """A tracker in memory. Its class holds the calls."""

    calls: ClassVar[list[Any]]
    fails = ""

    def __init__(self, path: Path, config: Mapping[str, Any], id: str) -> None:
        if self.fails == "start":
            raise OSError("no route to host")
        self.id = id or f"run-{len(self.calls)}"
        self.calls.append(("start", self.id, config["train"]["epochs"]))

    def add(self, values: Mapping[str, float], step: int) -> None:
        if self.fails == "add":
            raise OSError("connection lost")
        self.calls.append((step, dict(values)))

    def close(self) -> None:
        self.calls.append("close")


def write(path: Path, tracker: str, steps: range, resumed: int | None = None) -> None:
    """Opens a run folder, writes the losses of some steps, and closes the folder."""
    config = settings.load_recipe("digits")
    settings.apply(config, {"train.log_to": (tracker,)})
    folder = RunFolder(path, config, resumed)
    for step in steps:
        folder.write(step=step, epoch=step / 10, loss=1 / step, lr=math.nan)
    folder.close()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Own(Recorder):
        calls: ClassVar[list[Any]] = []

    monkeypatch.setitem(trackers._REMOTE, "wandb", Own)
    return Own


def test_a_continued_run_continues_the_remote_run(recorder: type[Recorder], tmp_path: Path) -> None:
    write(tmp_path, "wandb", range(1, 3))
    write(tmp_path, "wandb", range(3, 4), resumed=2)
    write(tmp_path, "wandb", range(1, 2))  # a new run in the same folder
    assert recorder.calls == [
        *[("start", "run-0", 100), (1, {"loss": 1.0}), (2, {"loss": 0.5}), "close"],
        *[("start", "run-0", 100), (3, {"loss": 1 / 3}), "close"],
        *[("start", "run-7", 100), (1, {"loss": 1.0}), "close"],
    ]
    assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "run-7"}


@pytest.mark.parametrize("when", ["start", "add"])
def test_a_tracker_that_fails_is_named_once_and_ends_no_run(
    recorder: type[Recorder], when: str, tmp_path: Path
) -> None:
    recorder.fails = when
    write(tmp_path, "wandb", range(1, 4))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    said = (tmp_path / "train.log").read_text()
    assert said.count("metrics go to wandb: OSError") == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    write(tmp_path, "wandb", range(1, 2))
    assert "pip install 'mocofast[wandb]'" in (tmp_path / "train.log").read_text()


def test_unknown_trackers_are_refused() -> None:
    config = settings.load_recipe("digits")
    settings.apply(config, {"train.log_to": ("tensorbord",)})
    with pytest.raises(ConfigError, match=r"train\.log_to: expected names among tensorboard"):
        settings.validate(config)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, "wandb", range(1, 3))
    write(tmp_path, "wandb", range(3, 4), resumed=2)
    remote = json.loads((tmp_path / IDS).read_text())["wandb"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{remote}.wandb"))
    assert files and all(file.stat().st_size for file in files)


def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    place = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write(tmp_path / "run", "mlflow", range(1, 3))
    write(tmp_path / "run", "mlflow", range(3, 4), resumed=2)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("mocofast")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.epochs"] == "100"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_comet_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    write(tmp_path, "comet", range(1, 3))
    write(tmp_path, "comet", range(3, 4), resumed=2)
    key = json.loads((tmp_path / IDS).read_text())["comet"]
    first, second = sorted(
        (tmp_path / "comet").glob("*.zip"), key=lambda file: file.stat().st_mtime
    )
    losses = {}
    for file in (first, second):
        with zipfile.ZipFile(file) as archive:
            assert json.loads(archive.read("experiment.json"))["offline_id"] == key
            for line in archive.read("messages.json").splitlines():
                metric = json.loads(line)["payload"].get("metric") or {}
                if metric.get("metricName") == "loss":
                    losses[metric["step"]] = metric["metricValue"]
    assert losses == {1: 1.0, 2: 0.5, 3: 1 / 3}


def test_trackio_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once, by the import
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    write(tmp_path / "run", "trackio", range(1, 3))
    write(tmp_path / "run", "trackio", range(3, 4), resumed=2)
    name = json.loads((tmp_path / "run" / IDS).read_text())["trackio"]
    assert SQLiteStorage.get_runs("mocofast") == [name]
    logs = SQLiteStorage.get_logs("mocofast", name)
    assert [(each["step"], each["loss"]) for each in logs] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
