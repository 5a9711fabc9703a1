"""Small sets of other fields that once were read wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from mocofast.config import DataConfig
from mocofast.data.decoding import decode
from mocofast.data.sources import Datasets, load_datasets


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps indices of shards out of the cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def load(path: Path, **options: object) -> Datasets:
    return load_datasets(DataConfig(path=str(path), **options))  # type: ignore[arg-type]


def names(datasets: Datasets) -> list[str]:
    return [datasets.train.name(i) for i in range(len(datasets.train))]


def test_chexpert_trains_on_train_alone(cases: Path) -> None:
    datasets = load(cases / "11_split_names/chexpert")
    assert len(datasets.train) == 20
    assert all(name.startswith("train/") for name in names(datasets))
    assert (datasets.train.labels, datasets.val) == (None, None)
    assert "folders are not taken for classes" in datasets.remarks[-1]


def test_stl10_trains_on_unlabeled_too(cases: Path) -> None:
    datasets = load(cases / "11_split_names/stl10")
    assert datasets.note == "50 images of 2 classes, 40 unlabelled; held out: test/, 10"
    assert sum(name.startswith("unlabeled/") for name in names(datasets)) == 40


def test_the_trimaps_of_pets_get_a_warning_and_are_excluded(cases: Path) -> None:
    (line,) = load(cases / "12_masks_as_images/pets").remarks
    assert "1 folder named annotations" in line
    assert "--data.exclude 'annotations'" in line
    kept = names(load(cases / "12_masks_as_images/pets", exclude=("annotations",)))
    assert len(kept) == 12
    assert all(name.startswith("images/") for name in kept)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("13_shard_dots/dots_some", "16 images without labels"),
        ("13_shard_dots/wds_input", "16 images of 2 classes; 2 of them held out"),
        ("15_shard_links/hardlinks", "16 images without labels"),
        ("16_labels_lost/cls_text", "16 images of 2 classes; 2 of them held out"),
        ("16_labels_lost/json_text", "16 images of 2 classes; 2 of them held out"),
        (
            "16_labels_lost/one_unlabelled",
            "16 images of 2 classes, 1 unlabelled; 2 of them held out",
        ),
    ],
)
def test_shards_lose_neither_samples_nor_labels(cases: Path, name: str, note: str) -> None:
    datasets = load(cases / name, source="shards")
    assert datasets.note == note
    assert datasets.remarks == ()
    for i in range(len(datasets.train)):
        item = datasets.train.load(i)
        assert isinstance(item, (str, bytes))
        decode(item)
    if "text" in name:
        assert datasets.train.classes == ("cat", "dog")


def test_the_image_beside_a_mask_can_be_chosen(cases: Path) -> None:
    path = cases / "14_shard_twin_image/mask_first"
    assert "0000.png is used, 0000.tif is not" in load(path, source="shards").remarks[0]
    chosen = load(path, source="shards", exclude=("*.png",)).train
    assert len(chosen) == 16
    content = chosen.load(0)
    assert isinstance(content, bytes)
    assert content[:4] in (b"II*\0", b"MM\0*")  # TIFF


def test_files_of_a_phone_are_counted_by_kind(cases: Path) -> None:
    datasets = load(cases / "18_files_ignored/phone")
    assert len(datasets.train) == 4
    (line,) = datasets.remarks
    assert line.startswith("31 files of other kinds ignored: 20 .heic, 6 .gif, 5 .avif; ")
    assert "pip install pillow-heif" in line
