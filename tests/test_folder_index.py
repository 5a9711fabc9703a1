"""The kept list of a large folder: used where nothing has changed, and never wrong in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mocofast.config import DataConfig
from mocofast.data import folder_index
from mocofast.data.sources import Datasets, load_datasets
from tests import runs

LONG_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_index, "FEWEST", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    runs.make_images(root / "train", 12, classes=3, side=8)
    runs.make_images(root / "val", 6, classes=3, side=8)
    (root / "train" / "notes.txt").touch()
    return aged(root)


def aged(root: Path) -> Path:
    """Gives all folders an old time, as those of a set that rests have."""
    for path, _, _ in os.walk(root):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return root


def lists(cache: Path) -> list[Path]:
    return list((cache / "mocofast" / "folders").glob("*.npz"))


def load(root: Path, **options: object) -> Datasets:
    return load_datasets(DataConfig(path=str(root), **options))  # type: ignore[arg-type]


def assert_same(got: Datasets, expected: Datasets) -> None:
    assert (got.note, got.remarks) == (expected.note, expected.remarks)
    for ours, theirs in zip(got[:2], expected[:2]):
        assert ours is not None and theirs is not None
        assert [ours.load(i) for i in range(len(ours))] == [
            theirs.load(i) for i in range(len(theirs))
        ]
        assert np.array_equal(ours.labels, theirs.labels)
        assert ours.classes == theirs.classes
        assert ours.fingerprint() == theirs.fingerprint()


def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list of folders that are listed from now on."""
    found: list[str] = []
    scandir = os.scandir

    def noting(path: str) -> object:
        found.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noting)
    return found


def test_an_unchanged_folder_is_not_listed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder)
    assert len(lists(tmp_path / "cache")) == 1
    seen = listed(monkeypatch)
    assert_same(load(folder), first)
    assert seen == []
    # Other options have a list of their own.
    assert len(load(folder, include=("*/class[01]/*",)).train) < len(first.train)
    assert seen
    assert len(load(folder, labels="none").train) == len(first.train)


def change(folder: Path, how: str) -> None:
    """Changes a set, and the time of the changed folder alone."""
    images = sorted((folder / "train" / "class1").iterdir())
    if how == "added":
        images[0].with_name("new.jpg").write_bytes(images[0].read_bytes())
    elif how == "removed":
        images[0].unlink()
    elif how == "renamed":
        images[0].rename(images[0].with_name("zz.jpg"))
    elif how == "moved":
        images[0].rename(folder / "train" / "class0" / "moved.jpg")
    elif how == "class":
        (folder / "train" / "class1").rename(folder / "train" / "class9")
    elif how == "empty class":
        (folder / "val" / "more").mkdir()
    elif how == "another folder of the same time":
        other = folder.with_name("other")
        runs.make_images(other, 6, classes=3, side=8)
        (folder / "val").rename(folder.with_name("old"))
        other.rename(folder / "val")
        aged(folder)


@pytest.mark.parametrize(
    "how",
    [
        *("added", "removed", "renamed", "moved", "class", "empty class"),
        "another folder of the same time",
    ],
)
def test_a_changed_folder_is_listed_again(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load(folder)
    change(folder, how)
    seen = listed(monkeypatch)
    got = load(folder)
    assert seen
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert_same(got, load(folder))


def test_a_link_to_another_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "second"
    runs.make_images(other, 8, side=8)
    aged(other)
    link.symlink_to(folder)
    first = load(link)
    link.unlink()
    link.symlink_to(other)
    assert len(first.train) == 12
    assert len(load(link).train) < 9


def test_a_folder_that_changed_just_now_is_not_kept(folder: Path, tmp_path: Path) -> None:
    """A second change might leave the time as it is."""
    os.utime(folder / "train" / "class2")
    load(folder)
    assert not lists(tmp_path / "cache")


@pytest.mark.parametrize("how", ["user", "version", "torn", "other", "text"])
def test_files_of_others_and_damaged_files_are_ignored(
    folder: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder)
    (kept,) = lists(tmp_path / "cache")
    if how == "user":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif how == "version":
        monkeypatch.setattr(folder_index, "__version__", "0")
    elif how == "torn":
        kept.write_bytes(kept.read_bytes()[:-300])
    elif how == "other":  # of another folder, under this name
        runs.make_images(tmp_path / "second", 8, side=8)
        load(aged(tmp_path / "second"))
        (second,) = set(lists(tmp_path / "cache")) - {kept}
        second.rename(kept)
    else:
        kept.write_text("nothing")
    seen = listed(monkeypatch)
    assert_same(load(folder), first)
    assert seen


def test_a_place_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(load(folder), load(folder))


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    root = runs.make_images(tmp_path / "set", 6, side=8)
    image = next((root / "class0").iterdir())
    os.rename(image, os.fsencode(root / "class0") + b"/\xff\xe9.jpg")
    first = load(aged(root))
    assert_same(load(root), first)
