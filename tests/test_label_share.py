"""Few labels: shares of every class, and lists of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.config import ConfigError, DataConfig
from mocofast.data.sources import labelled, load_datasets


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ and test/ of three classes, with 40, 12 and 2 training images."""
    for split, counts in (("train", (40, 12, 2)), ("test", (3, 3, 3))):
        for name, count in zip(("ant", "bee", "cow"), counts):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i:03}.png")
    return tmp_path


def test_a_share_keeps_labels_of_every_class_and_all_images(photos: Path) -> None:
    every = load_datasets(DataConfig(path=str(photos)))
    few = load_datasets(DataConfig(path=str(photos), labels="0.1"), seed=1)
    assert len(few.train) == len(every.train) == 54
    assert every.train.labels is not None
    assert few.train.labels is not None
    kept = few.train.labels >= 0
    assert np.bincount(few.train.labels[kept]).tolist() == [4, 1, 1]  # at least one of a class
    assert (few.train.labels == every.train.labels)[kept].all()
    assert few.val is not None
    assert len(few.val) == 9
    assert "data.labels 0.1: 6 of 54 labels, 3 classes" in few.remarks
    assert len(labelled(few.train)) == 6
    same, other = (
        load_datasets(DataConfig(path=str(photos), labels="0.1"), seed).train for seed in (1, 2)
    )
    assert same.fingerprint() == few.train.fingerprint()
    assert other.fingerprint() != few.train.fingerprint()
    whole = load_datasets(DataConfig(path=str(photos), labels="1.0"))
    assert whole.train.fingerprint() == every.train.fingerprint()


def test_the_share_comes_after_the_hold_out() -> None:
    few = load_datasets(DataConfig(source="digits", labels="0.05"))
    assert few.train.labels is not None
    assert np.bincount(few.train.labels[few.train.labels >= 0]).tolist() == [7] * 10
    assert few.val is not None
    assert len(few.val) == 359


def test_a_list_names_images_by_the_last_parts_of_their_paths(photos: Path) -> None:
    some = photos / "some.txt"
    some.write_text("ant/003.png\n\ntrain/bee/./001.png\n ant/030.png \nelsewhere/1.png\n")
    few = load_datasets(DataConfig(path=str(photos), labels=str(some))).train
    names = {few.name(i) for i in np.flatnonzero(np.asarray(few.labels) >= 0)}
    assert names == {"train/ant/003.png", "train/ant/030.png", "train/bee/001.png"}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("1.5", "expected a share above 0 and at most 1, got 1.5"),
        ("0", "expected a share above 0 and at most 1, got 0"),
        ("nan", "expected a share"),
        ("LIST:001.png", "'001.png' of .* is the name of train/ant/001.png and of train/bee/001"),
        ("LIST:x.png", "the 1 line of .* name no labelled training image; the images have names"),
        ("none.txt", "there is no list"),
    ],
)
def test_a_share_or_a_list_that_fits_nothing_is_an_error(
    photos: Path, labels: str, said: str
) -> None:
    if labels.startswith("LIST:"):
        (photos / "list.txt").write_text(labels.removeprefix("LIST:"))
        labels = str(photos / "list.txt")
    with pytest.raises((ConfigError, FileNotFoundError), match=said):
        load_datasets(DataConfig(path=str(photos), labels=labels))


def test_images_without_classes_have_no_share(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"expected labelled images for 0\.1, got none"):
        load_datasets(DataConfig(path=str(tmp_path), labels="0.1"))
