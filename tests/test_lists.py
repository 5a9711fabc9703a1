"""Lists of images and zip archives: their images, labels, splits and groups, and exact resume."""

from __future__ import annotations

import csv
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import BatchSlice
from mocofast.data.lists import ImageList, number_column
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.sources import Datasets, FolderSource, find_images, load_datasets
from mocofast.data.zips import ZipArchive, ZipSource
from tests.pictures import assert_same_batches, jpeg, named, put_images, save_photos

CPU = torch.device("cpu")
SMALL = AugmentConfig(size=19, jitter_p=0.8, blur=0.5)
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]


def write_list(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def from_list(path: Path, **options: object) -> Datasets:
    data = DataConfig(source="list", path=str(path), **options)  # type: ignore[arg-type]
    return load_datasets(data)


# Lists


def test_a_list_gives_paths_labels_and_splits_in_its_order(tmp_path: Path) -> None:
    put_images(tmp_path, *(f"im/{i}.png" for i in range(7)))
    rows = [
        ("im/3.png", "dog", "Train"),
        ("im/1.png", "cat", "train"),
        ("im/0.png", "cat", "valid"),
        ("im/2.png", "", "train"),
        ("im/4.png", "bird", "valid"),
        ("im/5.png", "cat", "other"),
        ("im/6.gif", "cat", "train"),
    ]
    datasets = from_list(write_list(tmp_path / "x.csv", ("Path", "Label", "split"), rows))
    names = [datasets.train.name(i) for i in range(3)]
    assert names == ["im/3.png", "im/1.png", "im/2.png"]
    assert datasets.train.classes == ("cat", "dog")
    assert datasets.train.labels is not None
    assert datasets.train.labels.tolist() == [1, 0, -1]
    assert datasets.train.load(0) == str(tmp_path / "im/3.png")
    assert datasets.val is not None
    assert named(datasets.val) == {"im/0.png": "cat"}
    assert datasets.remarks == (
        "1 file of other kinds ignored: 1 .gif; convert .gif to PNG or JPEG to use them",
        "rows of split other not used",
        "1 image of the evaluation not evaluated: no class of the training",
    )
    other = from_list(tmp_path / "x.csv", train=("other", "valid"), val="train")
    assert len(other.train) == 3
    with pytest.raises(
        ConfigError, match=r"data\.val: no row of split 'dev' \(other, train, valid"
    ):
        from_list(tmp_path / "x.csv", val="dev")


def test_columns_have_many_names_and_separators_and_options_name_others(tmp_path: Path) -> None:
    put_images(tmp_path, *(f"{i}.png" for i in range(6)))
    text = "\n".join(
        ["filename;breed;patient", *(f"{i}.png;{i % 2 + 10};p{i // 2}" for i in range(6))]
    )
    path = tmp_path / "x.csv"
    path.write_text(f"\ufeff{text}\n", encoding="utf-8")
    assert from_list(path).train.labels is None
    datasets = from_list(path, labels="breed", group="patient", holdout=0.3)
    assert datasets.train.classes == ("10", "11")
    assert datasets.val is not None
    held = {int(datasets.val.name(i)[0]) // 2 for i in range(len(datasets.val))}
    assert len(datasets.val) == 2
    assert len(held) == 1  # one whole patient
    assert from_list(path, labels="none").train.labels is None
    with pytest.raises(ConfigError, match=r"data\.labels: no column 'kind' .*filename, breed"):
        from_list(path, labels="kind")
    with pytest.raises(ConfigError, match=r"data\.group: no column 'person'"):
        from_list(path, labels="breed", group="person")


def test_folders_before_the_lists_folder_are_dropped(tmp_path: Path) -> None:
    root = put_images(tmp_path / "chest", "train/p1/1.jpg", "train/p2/2.jpg")
    rows = [(f"Chest-v1.0/train/p{i}/{i}.jpg",) for i in (1, 2)]
    images = ImageList(write_list(root / "train.csv", ("Path",), rows))
    assert images.paths() == ["train/p1/1.jpg", "train/p2/2.jpg"]
    (root / "train/p1/1.jpg").unlink()
    assert images.paths() == ["train/p1/1.jpg", "train/p2/2.jpg"]  # the second file is there
    (root / "train/p2/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"Chest-v1\.0/train/p1/1\.jpg' .* is not below"):
        images.paths()


def test_a_list_names_images_of_folders_above_and_of_hidden_folders(tmp_path: Path) -> None:
    put_images(tmp_path, "images/1.jpg", ".cache/2.jpg")
    (tmp_path / "lists").mkdir()
    rows = [("../images/1.jpg",), ("../.cache/2.jpg",)]
    found = from_list(write_list(tmp_path / "lists/train.csv", ("path",), rows))
    assert [found.train.name(i) for i in range(2)] == [row[0] for row in rows]


def test_a_list_that_cannot_be_used_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no list"):
        from_list(tmp_path / "none.csv")
    (tmp_path / "x.txt").write_text("path\n")
    with pytest.raises(ConfigError, match=r"ending of \.csv, \.tsv, \.parquet"):
        from_list(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="no rows in"):
        from_list(write_list(tmp_path / "x.csv", ("path",), []))
    with pytest.raises(ConfigError, match=r"no column of paths .* \(name, x\); expected .* path"):
        from_list(write_list(tmp_path / "x.csv", ("name", "x"), [("a.png", "1")]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('"im/4.png,cat', "line 6: a quote that is not closed"),  # takes the lines behind it
        (f"im/4.png,{'c' * 140_000}", "line 6: field larger than field limit"),
    ],
)
def test_a_damaged_row_of_a_list_is_named(tmp_path: Path, row: str, said: str) -> None:
    put_images(tmp_path, *(f"im/{i}.png" for i in range(9)))
    lines = [f"im/{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(9)]
    (tmp_path / "x.csv").write_text("\n".join(["path,label", *lines[:4], row, *lines[5:]]))
    with pytest.raises(ConfigError, match=rf"data\.path: '.*x\.csv', {said}"):
        from_list(tmp_path / "x.csv")


def test_quotes_and_line_ends_inside_of_cells_are_read(tmp_path: Path) -> None:
    cells = ['a "quoted" word', "two\nlines", 'a quote at the end"', "plain", '5" of rain']
    rows = [(f"im/{i}.png", cell) for i, cell in enumerate(cells)]
    path = write_list(tmp_path / "x.csv", ("path", "caption"), rows)
    assert ImageList(path).columns["caption"] == cells
    with path.open("a") as file:
        file.write('im/5.png,half a "quote\n')  # no quote of a cell
    assert ImageList(path).columns["caption"] == [*cells, 'half a "quote']


def test_a_parquet_list_is_a_csv_list(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    put_images(tmp_path, *(f"{i}.png" for i in range(4)))
    table = {"image": [f"{i}.png" for i in range(4)], "label": [3, None, 20_000_000, 3]}
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    datasets = from_list(tmp_path / "x.parquet", holdout=0.0)
    assert datasets.train.classes == ("3", "20000000")
    assert datasets.train.labels is not None
    assert datasets.train.labels.tolist() == [0, -1, 1, 0]
    images = pa.table({"image": [{"bytes": b"", "path": "x"}], "label": [0]})
    parquet.write_table(images, tmp_path / "bytes.parquet")
    with pytest.raises(
        ConfigError, match=r"no column of paths \(label\); --data.source parquet .* \(image\)"
    ):
        from_list(tmp_path / "bytes.parquet")


def test_labels_of_a_folder_may_come_from_a_list(tmp_path: Path) -> None:
    put_images(tmp_path, *(f"p{i}/1.jpg" for i in range(5)))
    rows = [(f"p{i}/1.jpg", "sick" if i % 2 else "well") for i in range(4)]
    path = write_list(tmp_path / "x.csv", ("path", "finding"), rows)
    data = DataConfig(path=str(tmp_path), labels=f"{path}:finding", holdout=0.0)
    train, _, note, remarks = load_datasets(data)
    assert train.classes == ("sick", "well")
    assert train.labels is not None
    assert train.labels.tolist() == [1, 0, 1, 0, -1]
    assert note == "5 images of 2 classes, 1 unlabelled, none held out"
    note = load_datasets(replace(data, target="tags")).note
    assert note == "5 images with 2 different labels, 1 unlabelled, none held out"
    assert remarks[-1] == f"1 image without a label in {path}"
    with pytest.raises(ConfigError, match=r"data\.labels: no column label .*/x\.csv:COLUMN"):
        load_datasets(DataConfig(path=str(tmp_path), labels=str(path)))
    put_images(tmp_path / "s", "train/p0/1.jpg", "train/p1/2.jpg", "dev/p2/3.jpg", "dev/p3/4.jpg")
    rows = [("S-1/train/p0/1.jpg", "a"), ("S-1/train/p1/2.jpg", "b"), ("S-1/dev/p2/3.jpg", "b")]
    path = write_list(tmp_path / "y.csv", ("path", "label"), rows)
    datasets = load_datasets(DataConfig(path=str(tmp_path / "s"), labels=str(path)))
    assert named(datasets.train) == {"train/p0/1.jpg": "a", "train/p1/2.jpg": "b"}
    assert datasets.val is not None
    assert named(datasets.val) == {"dev/p2/3.jpg": "b"}


def test_columns_of_labels_are_numbered_by_name_or_number() -> None:
    classes, labels = number_column(["10", "9", "", "10"])
    assert classes == ("9", "10")
    assert labels is not None
    assert labels.tolist() == [1, 0, -1, 1]
    classes, labels = number_column(["b", "10"])
    assert classes == ("10", "b")
    known = number_column(["a", "b"], ("b", "c"))[1]
    assert known is not None
    assert known.tolist() == [-1, 0]
    assert number_column(["a", "a", ""]) == ((), None)


# Zip archives


def write_zip(path: Path, root: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root).as_posix())
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_archive_is_the_folder_that_was_packed(tmp_path: Path, method: int) -> None:
    root = tmp_path / "set"
    put_images(
        root, *(f"in/{part}/{k}/{i}.png" for part in ("train", "val") for k in "ab" for i in "12")
    )
    (root / "in/notes.txt").write_text("text")
    path = write_zip(tmp_path / "x.zip", root, method)
    packed = load_datasets(DataConfig(source="zip", path=str(path)))
    plain = load_datasets(DataConfig(path=str(root)))
    assert packed.note == plain.note
    for left, right in zip(packed[:2], plain[:2]):
        assert isinstance(left, ZipSource)
        assert isinstance(right, FolderSource)
        assert left.fingerprint() == right.fingerprint()
        for i in range(len(left)):
            assert left.load(i) == Path(right.load(i)).read_bytes()
    assert pickle.loads(pickle.dumps(packed.train)).load(1) == packed.train.load(1)


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_show_a_zip_as_files_and_resume_exactly(tmp_path: Path, name: str) -> None:
    root = save_photos(tmp_path / "photos")
    names = find_images(root)
    labels, classes = np.arange(len(names)) % 3, ("a", "b", "c")
    files = FolderSource(root, names, labels, classes)
    archive = ZipArchive(write_zip(tmp_path / "x.zip", root))
    packed = ZipSource(archive, names, labels, classes)
    data = DataConfig(loader=name, workers=1)

    def stream(source: FolderSource | ZipSource) -> object:
        return build_loader(source, data, (SMALL, SMALL), BatchSlice(4), 5, CPU)

    whole = list(stream(packed).epoch(1))  # type: ignore[attr-defined]
    assert_same_batches(whole, stream(files).epoch(1))  # type: ignore[attr-defined]
    assert_same_batches(whole[2:], stream(packed).epoch(1, 2))  # type: ignore[attr-defined]


def test_a_broken_member_is_skipped_and_a_broken_or_locked_archive_is_an_error(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.jpg", jpeg(i))
        start = archive.infolist()[1].header_offset + 30 + len("1.jpg")
    content = bytearray(path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    source = load_datasets(DataConfig(source="zip", path=str(path))).train
    batches = EvalBatches(source, 16, 3, 0, CPU)
    assert torch.cat([index for _, _, index in batches]).tolist() == [0, 2]
    assert set(batches.skipped) == {1}
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"changed: 2\.jpg is no longer there"):
        source.load(2)
    with pytest.raises(ConfigError, match="is not a whole zip file"):
        ZipArchive(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.jpg", jpeg(1))
        archive.writestr("2.jpg", jpeg(2), zipfile.ZIP_STORED)
    datasets = load_datasets(DataConfig(source="zip", path=str(path)))
    assert len(datasets.train) == 1
    assert "left out: 1 method 12; unpack" in datasets.remarks[0]
    locked = bytearray(path.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption
    path.write_bytes(locked)
    with pytest.raises(ConfigError, match=r"1 file of .* with a password, 1\.jpg the first"):
        ZipArchive(path)
