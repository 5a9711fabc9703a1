"""Files whose content changes between a checkpoint and its continuation: said, or refused."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from mocofast.cli import main
from mocofast.config import DataConfig
from mocofast.data.sources import Subset, load_datasets
from mocofast.data.stamps import Stamp, changed, files_of, stamp_of
from tests.pictures import files, jpeg, save_photos


def test_sizes_times_and_content_are_told_apart(tmp_path: Path) -> None:
    source = files(save_photos(tmp_path / "photos"))
    before = stamp_of(source, True)
    assert Stamp(source, True).get() == before
    assert Stamp(source, False).get() == {k: before[k] for k in ("sizes", "times")}
    assert changed(before, stamp_of(source, True)) == ""
    path = tmp_path / "photos" / "005.jpg"
    old = path.stat()
    path.write_bytes(bytes(reversed(jpeg(5))))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert changed(before, stamp_of(source, True)) == "content"
    assert changed(before, stamp_of(source, False)) == ""
    path.write_bytes(jpeg(5))
    os.utime(path, ns=(1, 1))
    assert changed(before, stamp_of(source, True)) == ""
    assert changed(before, stamp_of(source, False)) == "times"
    path.write_bytes(jpeg(6))
    assert changed(before, stamp_of(source, False)) == "sizes"
    path.unlink()
    assert changed(before, stamp_of(source, False)) == "sizes"
    assert changed({}, before) == changed(before, {}) == ""


def test_every_kind_of_source_has_the_files_of_its_images(tmp_path: Path) -> None:
    root = save_photos(tmp_path / "photos", 4)
    paths = [str(root / f"{i:03}.jpg") for i in range(4)]
    source = files(root)
    assert list(files_of(source)) == paths
    assert list(files_of(Subset(source, source.labels[:2]))) == paths
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in paths:
            archive.write(path, Path(path).name)
    (tmp_path / "shards").mkdir()
    assert main(["prepare", str(root), str(tmp_path / "shards" / "all")]) == 0
    for kind, place, names in (
        ("zip", "x.zip", ["x.zip"]),
        ("shards", "shards", ["shard-000000.tar"]),
    ):
        data = DataConfig(source=kind, path=str(tmp_path / place))
        assert [Path(path).name for path in files_of(load_datasets(data).train)] == names
    assert stamp_of(load_datasets(DataConfig(source="digits")).train, True) == {}


def test_a_continued_run_says_or_refuses_changed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = save_photos(tmp_path / "photos"), tmp_path / "run"
    options = {
        "data.path": root,
        "data.loader": "torchvision",
        "data.workers": 0,
        "data.batch_size": 8,
        "data.checksum": "true",
        "augment.size": 16,
        "train.dir": run,
        "train.epochs": 2,
        "train.max_steps": 1,
        "model.arch": "resnet_tiny",
        "model.queue_size": 16,
    }

    def go_on(**changes: object) -> int:
        given = {**options, **{name.replace("__", "."): v for name, v in changes.items()}}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return main(["pretrain", *words, *(["--resume", "auto"] if changes else [])])

    assert go_on() == 0
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert go_on(train__max_steps=2, data__path=copy) == 0  # of the same content
    (copy / "003.jpg").write_bytes(jpeg(4))
    assert go_on(train__max_steps=3, data__path=copy) == 2
    assert "content of image files has changed" in capsys.readouterr().err
    assert go_on(train__max_steps=3, data__path=copy, data__checksum="false") == 0
    assert "other sizes than at the checkpoint" in (run / "train.log").read_text()
    os.utime(copy / "003.jpg", ns=(7, 7))
    assert go_on(train__max_steps=4, data__path=copy, data__checksum="false") == 0
    assert "other times than at the checkpoint: a copy, or" in (run / "train.log").read_text()
