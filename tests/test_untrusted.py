"""Checkpoints from anywhere: bounded, refused by name, and nothing is written or fetched for them.

The wrong files are made here, from a checkpoint of a run.
"""

from __future__ import annotations

import copy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast import cli
from mocofast.config import ConfigError
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.places import run_folder_of
from tests.test_faults import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder, train__max_steps=2)
    return folder


def put(*names: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Returns a function that sets an entry of a nested dictionary."""

    def change(state: dict[str, Any]) -> None:
        for name in names[:-1]:
            state = state[name]
        state[names[-1]] = value

    return change


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "queue": (put("config", "model", "queue_size", value=10**13), "model.queue_size: 10,000,000,"),
    "dim": (put("config", "model", "dim", value=10**13), "model.dim 10,000,000,000,000"),
    "negative": (put("config", "model", "queue_size", value=-4), "queue_size"),
    "images": (put("sizes", "images", value=-1), ""),
    "arch": (put("config", "model", "arch", value="no_such_net"), "no_such_net"),
    "group": (put("config", "loop", value={}), "unknown group 'loop'"),
    "config": (put("config", value=[1]), "no entry 'config'"),
    "no model": (drop("model"), "no entry 'model'"),
    "other model": (put("model", value={}), "the content does not fit the model"),
    "numbers": (put("model", "queue", value=3), "the content does not fit the model"),
    "expanded": (put("more", value=torch.zeros(1).expand(10**12)), "larger than the file"),
}
CONTINUED = {
    "format": (put("format", value=torch.ones(2)), "not a mocofast checkpoint"),
    "step": (put("step", value=-1), "step: expected a number of steps, got -1"),
    "epoch": (put("epoch", value="x"), "epoch: expected a number of steps, got 'x'"),
    "step in epoch": (put("step_in_epoch", value=12), "step_in_epoch: expected at most 11"),
    "data": (put("data", value={}), "the content does not fit the model"),
    "windows": (put("windows", value=[]), "the content does not fit the model"),
    "random state": (put("random_states", value=[{"cpu": 1}]), "does not fit the model"),
    "optimizer": (put("optimizer", value={}), "the content does not fit the model"),
}


@pytest.mark.parametrize("name", [*WRONG, *CONTINUED])
def test_wrong_content_is_refused_by_name(
    trained: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = {**WRONG, **CONTINUED}[name]
    state = copy.deepcopy(load_checkpoint(trained))
    change(state)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    file = folder / "checkpoints" / "last.pt"
    torch.save(state, file)
    commands = [["pretrain", "--resume", str(folder)]]
    if name in WRONG and name != "images":
        commands += [["knn", str(file)], ["export", str(file), "--format", "timm", "x.pt"]]
    if name == "images":  # the digits have images of their own
        commands = [["knn", str(file)]]
    for words in commands:
        status = cli.main(words)
        out = capsys.readouterr()
        assert status == 2 or name == "images", out.err
        assert said in out.err and "Traceback" not in out.err


def test_doctor_names_a_checkpoint_without_a_number_of_steps(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(trained)
    del state["step_in_epoch"]
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "last.pt")
    assert cli.main(["doctor", str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())  # the table breaks lines
    assert "damaged" in out and "step_in_epoch: expected a number of steps, got None" in out


def test_a_compressed_archive_is_refused(trained: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    last = trained / "checkpoints" / "last.pt"
    with (
        zipfile.ZipFile(last) as whole,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in whole.infolist():
            archive.writestr(entry.filename, whole.read(entry))
    with pytest.raises(ConfigError, match="a compressed entry"):
        load_checkpoint(packed)


def test_a_file_from_elsewhere_names_no_folder_to_write(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(trained)
    target = tmp_path / "target"
    state["config"]["train"]["dir"] = str(target)
    file = tmp_path / "downloaded" / "model.pt"
    file.parent.mkdir()
    torch.save(state, file)
    words = ["pretrain", "--resume", str(file), "--train.max_steps", "3"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert f"names '{target}'" in error and "--train.dir FOLDER" in error
    assert not target.exists()
    own = tmp_path / "own"
    assert cli.main([*words, "--train.dir", str(own)]) == 0
    assert (own / "checkpoints" / "last.pt").exists() and not target.exists()


def test_a_file_from_elsewhere_names_no_url(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    state = load_checkpoint(trained)
    url = "https://host.invalid/x-{000..001}.tar"
    state["config"]["data"] |= {"source": "shards", "path": url}
    file = tmp_path / "model.pt"
    torch.save(state, file)
    for words in (["pretrain", "--resume", str(file), "--train.dir", "x"], ["knn", str(file)]):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert f"names '{url}'" in error and "--data.path URL" in error


def test_the_run_folder_of_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    assert run_folder_of(trained) == trained
    assert run_folder_of(trained / "checkpoints" / "last.pt") == trained
    assert run_folder_of(trained / "exception.pt") == trained
    assert run_folder_of(shutil.copy(trained / "checkpoints/last.pt", tmp_path)) is None
