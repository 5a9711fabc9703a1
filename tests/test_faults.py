"""Faults of a run: full disks, exceptions, batches with a wrong loss, other ranks, other bits."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast import cli, files, settings
from mocofast.config import ConfigError
from mocofast.errors import DivergedError
from mocofast.interrupts import EXIT_INTERRUPTED, EXIT_SYSTEM
from mocofast.train import checkpoint_writer, evidence
from mocofast.train.checkpoint import FORMAT, load_checkpoint
from mocofast.train.checkpoint_writer import CheckpointWriter
from mocofast.train.engine import Engine
from mocofast.train.metrics import StepMetrics
from mocofast.train.run import Result, train
from tests import runs

NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


def run(folder: Path, resume: str = "", **options: Any) -> Result:
    """Trains the digits without evaluations, with a checkpoint after every second step."""
    config = settings.load_recipe("digits")
    values = {"train.dir": str(folder), "train.max_steps": 8, "train.log_every": 4}
    quiet = {"knn.every": 0, "knn.start": False, "checkpoint.every_steps": 2, "train.device": "cpu"}
    named = {name.replace("__", "."): value for name, value in options.items()}
    settings.apply(config, {**values, **quiet, "data.workers": 0, **named})
    return train(config, resume)


# ---- a full disk ----


def state(step: int) -> dict[str, Any]:
    return {"format": FORMAT, "step": step, "model": {"w": torch.full((1000,), float(step))}}


def test_a_write_that_fails_is_tried_again_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, tries = torch.save, []

    def full_for_two_tries(value: object, file: Any) -> None:
        tries.append(0)
        if len(tries) in (2, 3):
            file.write(b"half")
            raise NO_ROOM
        save(value, file)

    monkeypatch.setattr(torch, "save", full_for_two_tries)
    monkeypatch.setattr(checkpoint_writer, "RETRY", 0.01)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(state(1))
    writer.save(state(2))
    while len(tries) < 4:
        time.sleep(0.01)
    writer.wait()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    said = "the checkpoint of step 2 cannot be written: No space left on device"
    assert caplog.text.count(said) == 1 and "Training goes on" in caplog.text


def test_a_newer_checkpoint_takes_the_place_of_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(NO_ROOM))
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(state(1))
    writer.save(state(2))
    monkeypatch.setattr(torch, "save", save)
    writer.save(state(3))
    writer.wait()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_old_checkpoints_make_room_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def room_for_two_files(value: object, file: Any) -> None:
        if len(list(tmp_path.glob("step_*.pt"))) > 1:
            raise NO_ROOM
        save(value, file)

    for make_room in (False, True):
        writer = CheckpointWriter(tmp_path, keep=5, make_room=make_room)
        monkeypatch.setattr(torch, "save", save)
        writer.save(state(1))
        writer.save(state(2))
        writer.wait()
        monkeypatch.setattr(torch, "save", room_for_two_files)
        writer.save(state(3))
        if make_room:
            writer.wait()
            assert load_checkpoint(tmp_path / "last.pt")["step"] == 3
            assert not (tmp_path / "step_00000001.pt").exists()
        else:
            with pytest.raises(OSError, match="step 3 cannot be written"):
                writer.wait()
            assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_an_old_checkpoint_that_cannot_be_removed_is_no_silent_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pt":
            raise PermissionError(errno.EPERM, "Operation not permitted")

    writer = CheckpointWriter(tmp_path, keep=5, make_room=True)
    for step in (1, 2):
        writer.save(state(step))
        writer.wait()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(NO_ROOM))
    monkeypatch.setattr(Path, "unlink", refuse)
    writer.save(state(3))
    with pytest.raises(OSError, match="step 3 cannot be written: No space left"):
        writer.wait()


LIMITED = (
    "import resource, signal, sys\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
    "from mocofast import cli\n"
    "sys.exit(cli.main(sys.argv[2:]))\n"
)


def test_a_run_on_a_full_disk_trains_to_the_end_and_says_it_in_words(tmp_path: Path) -> None:
    """The system refuses files beyond 20 kB: every checkpoint, and the later lines of the log."""
    folder = tmp_path / "run"
    words = ["pretrain", "digits", "--train.dir", str(folder), "--train.max_steps", "30"]
    words += ["--checkpoint.every_steps", "5", "--train.log_every", "1", "--knn.start", "false"]
    words += ["--train.device", "cpu", "--data.workers", "0", "--knn.every", "0"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "4000", *words],
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == EXIT_SYSTEM, said
    assert "Traceback" not in said and "unexpected pos" not in said
    assert "step 30 cannot be written: File too large" in done.stderr
    assert "metrics.jsonl cannot be written" in said
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert not list((folder / "checkpoints").iterdir())
    assert runs.mocofast(*words, "--resume", "auto").returncode == 0


def test_lines_wait_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    lines = files.LineFile(path)
    lines.write("1\n")
    assert lines._file is not None

    class Full:
        """Takes two bytes, and then none."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 2

        def write(self, content: bytes) -> int:
            if not self.room:
                raise NO_ROOM
            written = self.file.write(content[: self.room])
            self.room -= written
            return int(written)

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

    file = lines._file
    lines._file = Full(file)  # type: ignore[assignment]
    lines.write("second\n")
    lines.write("third\n")
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    lines._file = file
    lines.write("fourth\n")
    lines.close()
    assert path.read_text() == "1\nsecond\nthird\nfourth\n"


# ---- what is written where ----


def test_a_write_replaces_regular_files_alone(tmp_path: Path) -> None:
    target, link, loop = tmp_path / "target", tmp_path / "link", tmp_path / "loop"
    target.write_text("old")
    link.symlink_to(target)
    loop.symlink_to(loop)
    with files.atomic_write(link) as path:
        path.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", loop, tmp_path, Path("/dev/null")):
        with (
            pytest.raises(ConfigError, match="expected the name of a file"),
            files.atomic_write(other) as path,
        ):
            path.write_text("x")
        assert not list(tmp_path.glob("*.tmp"))


def test_a_link_in_the_place_of_the_temporary_file_leads_nowhere(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "file.tmp").symlink_to(precious)
    with files.atomic_write(tmp_path / "file") as path:
        path.write_text("new")
    assert precious.read_text() == "kept" and (tmp_path / "file").read_text() == "new"


def test_a_rename_is_synced_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def record(number: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{number}")
        synced.append(is_folder)
        # Windows refuses to sync a file that is open for reading alone.
        may_write = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        assert is_folder or may_write
        fsync(number)

    monkeypatch.setattr(os, "fsync", record)
    with files.atomic_write(tmp_path / "file") as path:
        path.write_text("x")
    assert synced == [False, True]  # the content, then the name


def test_a_last_checkpoint_that_is_a_link_stays_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.pt"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").symlink_to(elsewhere)
    writer = CheckpointWriter(tmp_path / "run", keep=1)
    writer.save(state(4))
    writer.wait()
    assert (tmp_path / "run" / "last.pt").is_symlink()
    assert load_checkpoint(elsewhere)["step"] == 4


# ---- exceptions and wrong losses ----


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Any) -> list[int]:
    """`bad(call, metrics)` changes the metrics of a step. Returns the calls so far."""
    step, calls = Engine.step, []

    def spoiled(self: Engine, *args: Any) -> StepMetrics:
        calls.append(len(calls) + 1)
        metrics = step(self, *args)
        return bad(self, calls[-1], metrics)

    monkeypatch.setattr(Engine, "step", spoiled)
    return calls


def test_an_exception_leaves_the_state_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(engine: Engine, call: int, metrics: StepMetrics) -> StepMetrics:
        if call == 6:
            raise RuntimeError("a driver error")
        return metrics

    whole = tmp_path / "whole"
    run(whole)
    spoil(monkeypatch, fail)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="a driver error"):
        run(folder)
    kept = load_checkpoint(folder / "exception.pt")
    assert kept["step"] == 6 and load_checkpoint(folder)["step"] == 4
    assert run(folder, "auto").step == 8  # from step 4
    runs.assert_same_run(folder, whole)


def nan_once(path: Path) -> Any:
    """The weights become NaN at the batch of step 5, which is call 5, whenever it is trained on."""

    def change(engine: Engine, call: int, metrics: StepMetrics) -> StepMetrics:
        if call == 5:
            with torch.no_grad():
                next(engine.method.encoder_q.parameters()).fill_(math.nan)
        return metrics

    return change


def test_a_run_goes_back_and_leaves_the_batches_out_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights are NaN after step 5, the loss at step 6. Checkpoints after 4 steps, 8, ..."""
    calls = spoil(monkeypatch, nan_once(tmp_path))
    folder = tmp_path / "run"
    options = {"checkpoint__every_steps": 4, "train__skip_nonfinite": 1}
    assert run(folder, **options).step == 8
    assert len(calls) == 4 + 4 + 2  # to step 8, again from step 4 without 5 and 6
    last = load_checkpoint(folder)
    assert last["left_out"] == [5, 6] and last["step"] == 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [4, 8] and all(line["loss"] for line in lines)
    # The saved batch is the batch of the data stream.
    saved = torch.load(folder / evidence.FOLDER / "step_00000005_rank_0.pt")
    assert saved["step"] == 5 and len(saved["names"]) == len(saved["views"][0]) == 128


def test_without_the_option_a_run_stops_and_saves_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, torch.Tensor] = {}
    train_on = Engine.step

    def record(self: Engine, views: Any, *rest: Any) -> StepMetrics:
        seen[len(seen) + 1] = views[0].clone()
        return train_on(self, views, *rest)

    monkeypatch.setattr(Engine, "step", record)
    spoil(monkeypatch, nan_once(tmp_path))
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match="The batches of steps 5, 6 are in") as raised:
        run(folder, checkpoint__every_steps=4)
    assert raised.value.step is None or raised.value.step == 6
    for step in (5, 6):
        saved = torch.load(folder / evidence.FOLDER / f"step_{step:08d}_rank_0.pt")
        assert torch.equal(saved["views"][0], seen[step])


def test_batches_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NO_ROOM

    spoil(monkeypatch, nan_once(tmp_path))
    monkeypatch.setattr(evidence, "save_atomically", refuse)
    said = r"The batches of steps 5, 6 cannot be written \(No space left on device\)"
    with pytest.raises(DivergedError, match=said):
        run(tmp_path / "run", checkpoint__every_steps=4)


def test_the_limit_of_going_back_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "digits", "--train.dir", str(tmp_path / "run"), "--optim.lr", "1e30"]
    words += ["--train.skip_nonfinite", "2", "--train.log_every", "2", "--knn.start", "false"]
    assert cli.main([*words, "--train.device", "cpu"]) == 76
    assert "Traceback" not in capsys.readouterr().err


# ---- ranks and bits ----


def test_another_number_of_ranks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run(folder, train__max_steps=2)
    last = folder / "checkpoints" / "last.pt"
    content = load_checkpoint(last)
    content["random_states"] *= 2
    content["windows"] *= 2
    checkpoint_writer.save_atomically(content, last)
    run(folder, "auto", train__max_steps=3)
    log = (folder / "train.log").read_text()
    assert "the checkpoint is of 2 ranks, and the run goes on with 1" in log


def test_a_deterministic_run_repeats_to_the_bit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert not torch.are_deterministic_algorithms_enabled()
        run(tmp_path / name, train__deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- signals ----


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_warning_of_a_scheduler_writes_a_checkpoint_and_ends_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def warn(engine: Engine, call: int, metrics: StepMetrics) -> StepMetrics:
        if call == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return metrics

    spoil(monkeypatch, warn)
    folder = tmp_path / "run"
    words = ["pretrain", "digits", "--train.dir", str(folder), "--knn.start", "false"]
    assert cli.main([*words, "--train.device", "cpu", "--data.workers", "0"]) == EXIT_INTERRUPTED
    assert load_checkpoint(folder)["step"] == 3
