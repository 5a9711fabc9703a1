"""Checkpoints are whole or absent, are pruned, and are read without running code."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast import settings
from mocofast.methods.build import build_method
from mocofast.train import checkpoint
from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint
from mocofast.train.checkpoint_writer import CheckpointWriter, save_atomically


def state(step: int, value: torch.Tensor) -> dict[str, Any]:
    return {
        "format": checkpoint.FORMAT,
        "step": step,
        "model": {"w": value},
        "list": [value, 3],
        "text": "x",
    }


def test_the_newest_files_are_kept_and_last_is_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (3, 20, 100):
        writer.save(state(step, torch.full((2,), float(step))))
    writer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last.pt",
        "step_00000020.pt",
        "step_00000100.pt",
    ]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 100
    assert load_checkpoint(tmp_path / "step_00000020.pt")["model"]["w"].tolist() == [20.0, 20.0]


def test_keeping_none_leaves_last_alone(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=0)
    writer.save(state(1, torch.ones(1)))
    writer.save(state(2, torch.ones(1)))
    writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_training_may_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the values at save(), even if the tensors change during the write."""
    gate = threading.Event()
    save = torch.save

    def slow(*arguments: Any) -> None:
        assert gate.wait(10)
        save(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    value = torch.zeros(3).as_strided((2, 1), (1, 2))
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(state(1, value))
    value.fill_(7)
    assert not (tmp_path / "last.pt").exists()
    gate.set()
    writer.wait()
    assert load_checkpoint(tmp_path / "last.pt")["list"][0].tolist() == [[0.0], [0.0]]


def test_a_failing_write_is_reported_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(state(1, torch.ones(1)))
    writer.wait()

    def full_disk(value: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    writer.save(state(2, torch.ones(1)))
    with pytest.raises(OSError, match="no space left"):
        writer.wait()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    writer.wait()  # the error is reported once


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """The process ends between the write and the rename."""
    path = tmp_path / "last.pt"
    save_atomically(state(1, torch.ones(4)), path)
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        save_atomically(state(2, torch.zeros(4)), path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert load_checkpoint(path)["step"] == 1


def test_loading_runs_no_code_from_the_file(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with open(tmp_path / "bad.pt", "wb") as file:
        torch.save({"format": checkpoint.FORMAT, "model": Trap()}, file)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"format": 1})])
def test_files_of_another_kind_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt"):
        load_checkpoint(path)


def test_the_error_for_a_reference_checkpoint_names_the_right_function(
    tmp_path: Path,
) -> None:
    torch.save({"epoch": 1, "arch": "resnet50", "state_dict": {}}, tmp_path / "moco.pth.tar")
    with pytest.raises(ValueError, match="load_reference_state_dict"):
        load_checkpoint(tmp_path / "moco.pth.tar")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_comes_back_whole(dtype: str) -> None:
    config = settings.load_recipe("digits")
    config.model.queue_dtype, config.model.bn_splits, config.model.mlp = dtype, 2, True
    torch.manual_seed(3)
    model = build_method(config)
    again, same = model_from_checkpoint(
        {"config": settings.to_dict(config), "model": model.state_dict()}
    )
    assert same == config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.queue.dtype == getattr(torch, dtype)
