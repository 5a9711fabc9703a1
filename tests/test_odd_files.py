"""Pipes, links to nowhere, and names of files that are no text: named in the log, survived."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
import torch

from mocofast.cli import main
from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.decoding import decode, read_header
from mocofast.data.finding import Disk
from mocofast.data.interface import BatchSlice
from mocofast.data.items import opened
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.names import EXTENSIONS
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.scaled import decode_scaled
from mocofast.data.sources import FolderSource, load_datasets
from mocofast.errors import printable
from mocofast.log_format import PrintableFormatter
from tests.pictures import jpeg

ODD = os.fsdecode(b"\xff\x1b]0;title\x07\nINFO forged.jpg")
BAD = os.fsdecode(b"bad\xfe\x1b[31m.jpg")
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder of two classes with odd names, a bad image, a pipe and odd links."""
    root = tmp_path / "images"
    for number, name in enumerate((os.fsdecode(b"a\xe9"), "b\x1b[1m")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}{ODD}").write_bytes(jpeg(6 * number + i))
        (root / name / BAD).write_bytes(b"no image")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe.txt")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "to-pipe.jpg").symlink_to("pipe.jpg")
    (root / "loop").symlink_to(root)
    return root


def test_pipes_are_counted_and_links_to_nowhere_named(folder: Path) -> None:
    disk = Disk(folder, EXTENSIONS)
    found = disk.find("")
    assert len(found.names) == 16
    assert found.kinds == {"pipe, socket or device": 3}
    assert "3 files of other kinds ignored: 3 pipe, socket or device" in found.left_out()
    assert disk.holds_image()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pipe_among_named_files_is_skipped_and_named(folder: Path, loader: str) -> None:
    """A file may also be replaced after the folder was listed, or named by a list."""
    names = [*Disk(folder, EXTENSIONS).find("").names, "pipe.jpg", "to-pipe.jpg"]
    source = FolderSource(folder, names)
    stream = build_loader(
        source,
        DataConfig(loader=loader, workers=1),
        (AugmentConfig(size=16),),
        BatchSlice(len(names)),
        0,
        torch.device("cpu"),
    )
    (batch,) = stream.epoch(0)
    stream.close()
    reasons = {source.name(i): reason for i, reason in stream.skipped.items()}
    assert len(reasons) == 6
    assert "not a regular file" in reasons["pipe.jpg"]
    assert "not a regular file" in reasons["to-pipe.jpg"]
    assert "symbolic links" in reasons["self.jpg"]
    assert "No such file" in reasons["nowhere.jpg"]
    assert not set(batch.index.tolist()) & set(stream.skipped)


@pytest.mark.parametrize("read", [opened, read_header, decode, lambda f: decode_scaled(f, int)])
def test_every_way_to_read_a_file_refuses_a_pipe(folder: Path, read: object) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        read(str(folder / "pipe.jpg"))  # type: ignore[operator]


def test_a_run_survives_odd_names_and_escapes_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = {
        "data.path": folder,
        "data.loader": "torchvision",
        "data.workers": 0,
        "data.batch_size": 4,
        "data.holdout": 0,
        "augment.size": 16,
        "train.epochs": 1,
        "train.dir": run,
        "model.arch": "resnet_tiny",
        "model.queue_size": 8,
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    assert main(["pretrain", *words]) == 0
    log = (run / "train.log").read_text(encoding="utf-8")
    screen = capsys.readouterr().out
    for text in (log, screen):
        assert r"bad\xfe\x1b[31m.jpg" in text
        assert all(c == "\n" or c.isprintable() for c in text)
    named = [json.loads(line)["file"] for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert BAD in {Path(name).name for name in named}


def test_prepare_survives_odd_names(folder: Path, tmp_path: Path) -> None:
    meta = prepare(str(folder), str(tmp_path / "out"), PrepareConfig(workers=1))
    assert meta["images"] == {"all": 12}
    assert len(meta["skipped"]) == 4
    train = load_datasets(DataConfig(source="shards", path=str(tmp_path / "out"))).train
    assert all(printable(train.name(i)).isprintable() for i in range(len(train)))


def test_odd_names_in_shards_are_survived(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"{i}{ODD}")
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    train = load_datasets(DataConfig(source="shards", path=str(tmp_path))).train
    assert [train.load(i) for i in range(4)] == [jpeg(i) for i in range(4)]
    assert printable(train.name(0)).isprintable()


def test_lines_of_a_log_are_printable() -> None:
    assert printable("plain é 日本") == "plain é 日本"
    assert printable("\x1b[2J\n\udce9\ud800\u202e") == r"\x1b[2J\n\xe9\ud800\u202e"
    record = logging.LogRecord("x", logging.INFO, "x", 1, "a\nb %s", ("\x07\udcff",), None)
    assert PrintableFormatter("%(message)s").format(record) == "a\nb \\x07\\xff"
