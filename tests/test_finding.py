"""Which files of a folder are images of a set, and what is said about the others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mocofast.config import ConfigError, DataConfig
from mocofast.data import finding
from mocofast.data.finding import Disk, Names, Patterns
from mocofast.data.layout import grouped_holdout
from mocofast.data.names import EXTENSIONS
from mocofast.data.sources import Datasets, find_images, labelled, load_datasets
from tests.pictures import named, put_images


def folder(path: Path, **options: object) -> Datasets:
    return load_datasets(DataConfig(path=str(path), **options))  # type: ignore[arg-type]


def names(datasets: Datasets) -> list[str]:
    return [datasets.train.name(i) for i in range(len(datasets.train))]


# Patterns


def test_patterns_match_paths_and_all_below_a_folder() -> None:
    only = Patterns(include=("images/*", "*.tif"), exclude=("*/bad", "images/x?.png"))
    kept = ["images/a.png", "images/deep/b.png", "c.tif", "bad.tif", "masks/d.tif"]
    left = ["a.png", "images/bad/a.png", "images/x1.png", "masks/bad/y/d.tif", "Images/a.png"]
    assert [path for path in kept + left if only.keeps(path)] == kept
    assert all(Patterns().keeps(path) for path in kept + left)
    assert Patterns(include=("[ab]*.png",)).keeps("b.png")


def test_include_and_exclude_choose_the_images_and_their_number_is_said(tmp_path: Path) -> None:
    put_images(tmp_path, "images/a/1.jpg", "images/b/2.jpg", "masks/a/1.png", "masks/b/2.png")
    (tmp_path / "images/notes.txt").write_text("text")
    datasets = folder(tmp_path, include=("images",), holdout=0.0)
    assert names(datasets) == ["images/a/1.jpg", "images/b/2.jpg"]
    assert datasets.train.classes == ("a", "b")  # images/ is passed through
    assert datasets.remarks == (
        "1 file of other kinds ignored: 1 .txt; 2 images left out by data.include and data.exclude",
    )
    assert names(folder(tmp_path, exclude=("masks/*",))) == names(datasets)
    with pytest.raises(ConfigError, match=r"no image below .* 4 images left out by data\.include"):
        folder(tmp_path, include=("*.gif",))


def test_patterns_of_the_command_line_keep_their_brackets() -> None:
    from mocofast import settings

    config = settings.load_recipe("digits")
    settings.apply(config, {"data.include": "[0-9]*.png, *_[ab]", "data.exclude": ""})
    assert config.data.include == ("[0-9]*.png", "*_[ab]")
    assert config.data.exclude == ()


# What is said


def test_files_of_other_kinds_are_counted_by_kind(tmp_path: Path) -> None:
    put_images(tmp_path, "1.jpg", "2.jpg")
    others = [*(f"{i}.HEIC" for i in range(20)), *(f"{i}.gif" for i in range(6)), "LICENSE"]
    for name in (*others, ".hidden.gif", *(f"x.{kind}" for kind in "abcde")):
        (tmp_path / name).write_bytes(b"")
    (line,) = folder(tmp_path).remarks
    assert line == (
        "32 files of other kinds ignored: 20 .heic, 6 .gif, 1 without extension, 1 .a, 1 .b "
        "and 3 more; convert .gif, .heic to PNG or JPEG to use them "
        "(pip install pillow-heif, and --data.include '*.heic,*.jpg' reads .heic)"
    )


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        *((name, True) for name in ("mask", "Masks", "label", "annotations", "ground_truth")),
        *((name, True) for name in ("SegmentationClass", "train_masks", "gt", "trimaps")),
        *((name, False) for name in ("with_mask", "without_mask", "maskenball", "unlabelled_x")),
    ],
)
def test_folders_of_masks_get_a_warning(tmp_path: Path, name: str, warned: bool) -> None:
    put_images(tmp_path, "images/1.jpg", "images/2.jpg", f"{name}/trimaps/1.png")
    lines = [line for line in folder(tmp_path).remarks if "masks or labels" in line]
    deep = "trimaps" if not warned else name
    assert len(lines) == 1
    assert lines[0].startswith(f"1 folder named {deep} (")
    assert "with 1 of 3 images" in lines[0]
    pattern = lines[0].split("'")[1]
    assert names(folder(tmp_path, exclude=tuple(pattern.split(",")))) == [
        "images/1.jpg",
        "images/2.jpg",
    ]


def test_masks_below_every_class_are_one_line_and_a_set_of_masks_is_none(tmp_path: Path) -> None:
    put_images(
        tmp_path,
        *(f"{kind}/{part}/{i}.png" for kind in "ab" for part in ("good", "mask") for i in "12"),
    )
    (line,) = folder(tmp_path).remarks
    assert line.startswith("2 folders named mask (a/mask, b/mask) with 4 of 8 images: ")
    assert len(folder(tmp_path, exclude=("*/mask",), holdout=0.0).train) == 4
    assert folder(tmp_path / "a" / "mask").remarks == ()


def test_a_folder_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    listed = os.scandir

    def scandir(path: str) -> object:  # the tests run as root, who may read everything
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    put_images(tmp_path / "all", "b/train/1.jpg")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"no image below .* 1 folder cannot be read .*: b \("):
        folder(tmp_path / "all")
    with pytest.raises(ConfigError, match=r"data\.path: .*/b' cannot be read \(.*Permission"):
        find_images(tmp_path / "b")
    shutil.rmtree(tmp_path / "all", ignore_errors=True)
    datasets = folder(tmp_path, holdout=0.0)
    assert names(datasets) == ["a/1.jpg", "c/3.jpg"]
    (line,) = datasets.remarks
    assert line.startswith("1 folder cannot be read and left out: b (PermissionError")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("x.zip", "--data.source zip"),
        ("x.CSV", "--data.source list"),
        ("x.h5", "h5py"),
        ("x.tgz", "gunzip"),
        ("x.v2.tar.gz", "gunzip"),
        ("x.tar", "--data.source shards"),
    ],
)
def test_a_container_named_as_a_folder_is_recognised(tmp_path: Path, name: str, way: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(NotADirectoryError, match=rf"data\.path .*{name}' is a file; .*{way}"):
        folder(tmp_path / name)


def test_names_of_an_archive_are_found_like_files_of_a_folder(tmp_path: Path) -> None:
    paths = ["a/x.jpg", "a/mask/y.png", "b/z.tif", "b/notes.txt", "top.png", ".hid/a.png"]
    put_images(tmp_path, *(path for path in paths if not path.endswith("txt")))
    (tmp_path / "b/notes.txt").write_text("text")
    disk, archive = Disk(tmp_path, EXTENSIONS), Names(paths, EXTENSIONS)
    only = Patterns(exclude=("*.tif",))
    for place in ("", "a/", "b/"):
        assert disk.entries(place) == archive.entries(place)
        assert disk.find(place, only) == archive.find(place, only)
    assert disk.find("", only).excluded == 1


# Train and val sets


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Dev"),
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("train2017", "val2017"),  # COCO
    ],
)
def test_splits_are_known_by_many_names_in_any_case(tmp_path: Path, train: str, val: str) -> None:
    put_images(
        tmp_path,
        *(f"{part}/{kind}/{i}.jpg" for part in (train, val) for kind in "ab" for i in "12"),
    )
    datasets = folder(tmp_path)
    assert named(datasets.train) == {f"{train}/{kind}/{i}.jpg": kind for kind in "ab" for i in "12"}
    assert datasets.val is not None
    assert named(datasets.val) == {f"{val}/{kind}/{i}.jpg": kind for kind in "ab" for i in "12"}
    assert datasets.note == f"4 images of 2 classes; held out: {val}/, 4"
    assert datasets.remarks == ()


def test_options_name_the_splits_and_folders_beside_them_are_said(tmp_path: Path) -> None:
    put_images(
        tmp_path,
        *(f"{part}/{kind}/1.jpg" for part in ("one", "two", "three", "train") for kind in "ab"),
    )
    datasets = folder(tmp_path, train=("one", "two/"), val="three")
    assert datasets.val is not None
    assert sorted(named(datasets.train)) == [
        "one/a/1.jpg",
        "one/b/1.jpg",
        "two/a/1.jpg",
        "two/b/1.jpg",
    ]
    assert named(datasets.val) == {"three/a/1.jpg": "a", "three/b/1.jpg": "b"}
    assert datasets.remarks == ("train/ beside one/, two/, three/ not used",)
    grouped = folder(tmp_path, train=("one", "two/"), val="three", group="1").remarks
    assert grouped[1:] == ("data.group not used: three/ is held out already",)
    only_val = folder(tmp_path, val="three")
    assert "three/a/1.jpg" not in names(only_val)
    assert len(only_val.train) == 2  # of train/
    with pytest.raises(ConfigError, match=r"data\.val: no images or folders in 'four' .*one/"):
        folder(tmp_path, val="four")


def test_only_val_named_leaves_all_other_images_for_training(tmp_path: Path) -> None:
    put_images(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg", "held/a/4.jpg", "held/b/5.jpg")
    datasets = folder(tmp_path, val="held")
    assert names(datasets) == ["a/1.jpg", "b/2.jpg", "b/3.jpg"]
    assert datasets.val is not None
    assert named(datasets.val) == {"held/a/4.jpg": "a", "held/b/5.jpg": "b"}


def test_unlabeled_images_beside_train_are_trained_on_without_a_label(tmp_path: Path) -> None:
    put_images(
        tmp_path,
        *(f"{part}/{kind}/1.jpg" for part in ("train", "test") for kind in "ab"),
        *(f"unlabeled/{i}.jpg" for i in range(3)),
    )
    datasets = folder(tmp_path)
    assert datasets.note == "5 images of 2 classes, 3 unlabelled; held out: test/, 2"
    assert datasets.train.labels is not None
    assert datasets.train.labels.tolist() == [0, 1, -1, -1, -1]
    known = labelled(datasets.train)
    assert named(known) == {"train/a/1.jpg": "a", "train/b/1.jpg": "b"}


@pytest.mark.parametrize("inside", ["", "train/", "Data/Set/"])
def test_folders_that_hold_one_folder_are_passed_through(tmp_path: Path, inside: str) -> None:
    put_images(tmp_path, *(f"{inside}images/{kind}/1.jpg" for kind in "ab"))
    (tmp_path / "README.md").write_text("text")
    assert named(folder(tmp_path, holdout=0.0).train) == {
        f"{inside}images/{kind}/1.jpg": kind for kind in "ab"
    }


def test_splits_in_the_folder_of_an_archive_are_found(tmp_path: Path) -> None:
    put_images(tmp_path, *(f"Set-1.0/{part}/{k}/1.jpg" for part in ("train", "val") for k in "ab"))
    datasets = folder(tmp_path)
    assert names(datasets) == ["Set-1.0/train/a/1.jpg", "Set-1.0/train/b/1.jpg"]
    assert datasets.val is not None


def test_a_val_folder_of_one_class_is_labelled(tmp_path: Path) -> None:
    put_images(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/images/b/1.jpg")
    datasets = folder(tmp_path)
    assert datasets.val is not None
    assert named(datasets.val) == {"val/images/b/1.jpg": "b"}


def test_classes_named_like_splits_get_a_warning(tmp_path: Path) -> None:
    put_images(tmp_path, "train/1.jpg", "car/2.jpg", "plane/3.jpg")
    (line,) = folder(tmp_path).remarks
    assert line == (
        "train among the classes: if they are parts of the set, "
        "--data.train train --data.val FOLDER name the parts"
    )
    put_images(tmp_path / "mvtec", *(f"{k}/{p}/1.jpg" for k in "ab" for p in ("train", "test")))
    (line,) = folder(tmp_path / "mvtec").remarks
    assert "folders named test, train lie below the root" in line
    assert len(folder(tmp_path / "mvtec", include=("*/train/*",), holdout=0.0).train) == 2


def test_patients_in_train_and_val_are_no_classes(tmp_path: Path) -> None:
    put_images(
        tmp_path,
        *(f"train/patient{i:02}/study/1.jpg" for i in range(12)),
        *(f"valid/patient{i:02}/study/1.jpg" for i in range(20, 23)),
    )
    datasets = folder(tmp_path)
    assert datasets.train.labels is None
    assert datasets.val is None
    assert len(datasets.train) == 12
    (line,) = datasets.remarks
    assert line.startswith(
        "no folder of valid/ (patient20, patient21, patient22) is among those of"
    )
    put_images(tmp_path / "flat", *(f"patient{i:02}/1.jpg" for i in range(12)))
    assert "12 class folders for 12 images" in folder(tmp_path / "flat").remarks[0]
    assert folder(tmp_path / "flat", labels="none").train.labels is None


# Groups


def test_groups_are_held_out_whole(tmp_path: Path) -> None:
    put_images(
        tmp_path, *(f"{k}/p{p}/{i}.jpg" for k in "ab" for p in range(10) for i in range(p % 3 + 1))
    )

    for seed in range(5):
        data = DataConfig(path=str(tmp_path), group="2", holdout=0.3)
        datasets = load_datasets(data, seed)
        assert datasets.val is not None
        train, val = (  # patients, who have images of both classes
            {name.split("/")[1] for name in named(part)} for part in (datasets.train, datasets.val)
        )
        assert not train & val
        assert len(datasets.train) + len(datasets.val) == 38
        assert 0.2 < len(datasets.val) / 38 < 0.4
        again = load_datasets(data, seed).val
        assert again is not None
        assert again.fingerprint() == datasets.val.fingerprint()
    with pytest.raises(ConfigError, match=r"data\.group: a/p0/0\.jpg has no folder at level 3"):
        folder(tmp_path, group="3")
    with pytest.raises(ConfigError, match=r"data\.group: expected the level .* got 'patient'"):
        folder(tmp_path, group="patient")


def test_a_grouped_holdout_is_near_its_share_and_keeps_a_group() -> None:
    groups = np.repeat(np.arange(200), 5)
    held = grouped_holdout(groups, 0.1, seed=0)
    assert len(held) == 100
    assert len(set(groups[held])) == 20
    assert grouped_holdout(groups, 0.1, seed=1).tolist() != held.tolist()
    assert len(set(groups[grouped_holdout(groups, 0.99999, seed=0)])) == 199
    assert grouped_holdout(np.zeros(5, np.int64), 0.5, 0).tolist() == []
    assert grouped_holdout(groups, 0.0, 0).tolist() == []
    assert len(grouped_holdout(np.array([0] * 9 + [1]), 0.01, 0)) in (1, 9)


def test_find_images_says_what_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1 file of other kinds ignored: 1 \.gif; convert"):
        find_images(tmp_path)


def test_folders_below_many_levels_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's stack ends near 1,000 levels."""
    monkeypatch.setattr(finding, "DEEPEST", 4)
    put_images(tmp_path, "1/2/3/in.png", "1/2/3/4/out.png", "1/2/3/4/5/out.png")
    found = finding.Disk(tmp_path, {".png"}).find("")
    assert found.names == ["1/2/3/in.png"]
    assert found.unreadable == {"1/2/3/4": "OSError: below 4 levels of folders"}
    assert found.warnings() == [
        "1 folder cannot be read and left out: 1/2/3/4 (OSError: below 4 levels of folders)"
    ]
    (tmp_path / "1/2/3/in.png").unlink()
    assert not finding.Disk(tmp_path, {".png"}).holds_image()
