"""A run folder is claimed by one run, and damaged files of a run neither load nor end a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.health.watch import read_signals
from mocofast.interop.initial import initialise
from mocofast.interop.reference_checkpoints import load_any
from mocofast.methods.build import build_method
from mocofast.report.parts import read_skipped
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.checkpoint_writer import CheckpointWriter
from mocofast.train.claim import LOCK, claimed_folder
from mocofast.train.engine import Engine
from mocofast.train.run import train
from tests.test_cli import call


def run(folder: Path, steps: int, resume: str = "", **options: Any) -> Any:
    """Trains the digits without evaluations up to a step."""
    config = settings.load_recipe("digits")
    values = {"train.dir": str(folder), "train.max_steps": steps, "train.log_every": 1}
    quiet = {"knn.every": 0, "knn.start": False, "checkpoint.every_steps": 1, "checkpoint.keep": 3}
    settings.apply(config, {**values, **quiet, **options})
    return train(config, resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, 3)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_without_last_the_newest_step_file_continues(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "checkpoints" / "last.pt").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(folder, 4)
    assert run(folder, 4, "auto").step == 4
    assert steps_of(folder) == [1, 2, 3, 4]
    assert "step_00000003.pt" in caplog.text


def test_on_a_cpu_the_line_of_a_step_does_not_wait_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, written = Engine.step, []

    def look(engine: Engine, *given: Any) -> Any:
        written.append(steps_of(tmp_path))
        return step(engine, *given)

    monkeypatch.setattr(Engine, "step", look)
    run(tmp_path, 3, **{"checkpoint.every_steps": 0})
    assert written == [[], [1], [1, 2]]


def flip(path: Path, rng: random.Random) -> None:
    """Flips a bit of a file. Copies the file first, because names of a file share its content."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()
    path.write_bytes(content)


def test_every_command_compares_checksums_and_takes_the_older_checkpoint(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = folder / "checkpoints" / "last.pt"
    whole = load_checkpoint(last)
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    # The names and the padding of this entry's header take less than half of the entry.
    content[largest.header_offset + largest.file_size // 2] ^= 1
    last.unlink()
    last.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        load_any(str(last))
    with pytest.raises(ConfigError, match="damaged"):
        initialise(build_method(settings.from_dict(whole["config"])), str(last), "resnet_tiny")
    assert load_any(str(folder)).content["step"] == 3  # of the step file
    assert "step_00000003.pt" in caplog.text


def test_flipped_bits_never_load_as_other_values(folder: Path) -> None:
    path = folder / "checkpoints" / "last.pt"
    whole, rng = path.read_bytes(), random.Random(0)
    expected = torch.load(path, weights_only=True)["model"]
    refused = 0
    for _ in range(30):
        path.unlink()
        path.write_bytes(whole)
        flip(path, rng)
        try:
            found = load_checkpoint(path)["model"]
        except ConfigError:
            refused += 1
            continue  # else a bit of the padding flipped
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert refused >= 20


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    files = folder / "checkpoints"
    for name in ("last.pt", "step_00000003.pt"):
        content = bytearray((files / name).read_bytes())
        content[len(content) // 2] ^= 1  # inside the weights
        (files / name).unlink()
        (files / name).write_bytes(content)
    status, out, _ = call(capsys, "doctor", str(folder))
    assert status == 1
    assert out.count("damaged") >= 2 and "step 2, epoch 0 + 2 steps" in out
    assert "\nverdict" in out  # a crash is when one asks
    assert load_checkpoint(folder)["step"] == 2
    assert "wrong checksum" in caplog.text and "of step 2" in caplog.text
    with pytest.raises(ConfigError, match="wrong checksum"):
        load_checkpoint(files / "last.pt")
    assert run(folder, 4, "auto").step == 4
    assert steps_of(folder) == [1, 2, 3, 4]


def test_the_last_written_files_are_kept_after_going_back(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for moment, step in enumerate((8, 9, 5, 6)):
        writer.save({"step": step})
        writer.wait()
        file = tmp_path / f"step_{step:08d}.pt"
        os.utime(file, ns=(moment + 1, moment + 1))
    writer.save({"step": 7})
    writer.wait()
    assert {file.name for file in tmp_path.glob("step_*")} == {
        "step_00000006.pt",
        "step_00000007.pt",
    }


def test_if_no_checkpoint_is_whole_nothing_starts_over(folder: Path) -> None:
    for file in (folder / "checkpoints").glob("*.pt"):
        file.unlink()
        file.write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be read"):
        run(folder, 4, "auto")
    assert steps_of(folder) == [1, 2, 3]


def test_a_whole_folder_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "doctor", str(folder))
    assert status == 0 and "damaged" not in out and out.count("whole") == 5
    assert call(capsys, "doctor", str(folder.parent))[0] == 2


@pytest.mark.parametrize(
    "torn",
    [
        *(b"", b"{", b"[1]\n", b"\xff\xfe\n", b"\n\n", b"{}\n", b"[" * 9999),
        b'{"step": 1, "file": "\xed\xa0\x80"}\n',  # JSON takes half of a character
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped.jsonl"])
def test_torn_files_of_the_log_do_not_block_a_run(folder: Path, name: str, torn: bytes) -> None:
    path = folder / name
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + torn)
    assert run(folder, 4, "auto").step == 4
    assert steps_of(folder) == [1, 2, 3, 4]
    damaged = path.with_name(f"{name}.damaged")
    assert damaged.exists() == bool(torn)
    if torn:
        assert damaged.read_bytes() == before + torn


@pytest.mark.parametrize("torn", [b"[" * 9999, b'{"facts": 3, "file": 3}\n', b"\xff\n", b"[]\n"])
def test_torn_lines_of_signals_and_skipped_files_are_left_out(tmp_path: Path, torn: bytes) -> None:
    facts, line = {"facts": {"images": 9}}, {"step": 2, "loss": 0.5}
    whole = b"".join(json.dumps(each).encode() + b"\n" for each in (facts, line))
    (tmp_path / "signals.jsonl").write_bytes(whole + torn)
    assert read_signals(tmp_path) == (facts["facts"], [line])
    (tmp_path / "skipped.jsonl").write_bytes(b'{"file": "a.jpg", "reason": "cut"}\n' + torn)
    assert read_skipped(tmp_path) == [("a.jpg", "cut")]


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    config = Config()
    config.train.dir = str(tmp_path / "run")
    with claimed_folder(config, False) as path:
        (path / "config.yaml").touch()
        said = f"in use by process {os.getpid()} on "
        with pytest.raises(ConfigError, match=said), claimed_folder(config, True):
            pass
        with pytest.raises(ConfigError, match="in use"):
            run(path, 1)
    with claimed_folder(config, True):  # free again. The lock of a dead process is free, too
        pass


def test_a_lock_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows removes no file that is open."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(path)

    def fail() -> None:
        with claimed_folder(config, False):
            raise ConfigError("an error of the run")

    config = Config()
    config.train.dir = str(tmp_path / "run")
    with monkeypatch.context() as windows:
        windows.setattr(Path, "unlink", refuse)
        with pytest.raises(ConfigError, match="of the run"):
            fail()
    with claimed_folder(config, True):  # free again
        pass


def test_starts_without_a_folder_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(recipe="digits")
    with claimed_folder(config, False) as first, claimed_folder(config, False) as second:
        assert first != second
        (first / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [first.name]
    assert {path.name for path in first.iterdir()} == {LOCK, "config.yaml"}
