"""Parquet and Arrow files with image bytes: images, labels, sets, and exact resume."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mocofast import cli
from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data import tables
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.packed import PackedSource
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.sources import Datasets, FolderSource, load_datasets
from mocofast.data.table_sets import set_of
from tests import runs
from tests.pictures import assert_same_batches, jpeg, named, save_photos

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CPU = torch.device("cpu")
SMALL = AugmentConfig(size=19, jitter_p=0.8, blur=0.5)
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mocofast/tables"


def hub_table(rows: range, names: tuple[str, ...] = ("cat", "dog"), **more: Any) -> Any:
    """Returns a table in the layout of the Hugging Face Hub. Row i holds jpeg(i)."""
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in rows]
    feature = {"label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table(
        {"image": pa.array(images, IMAGE), "label": [i % len(names) for i in rows], **more}
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": feature}})}
    )


def of(path: Path | str, **options: Any) -> Datasets:
    return load_datasets(DataConfig(**{"source": "parquet", "path": str(path), **options}))


def save_stream(table: Any, path: Path, rows: int = 3) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=rows)


# Images


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_gives_the_bytes_of_every_row(
    tmp_path: Path, compression: str, dictionary: bool
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        hub_table(range(20)),
        path,
        row_group_size=7,
        compression=compression,
        use_dictionary=dictionary,
    )
    train = of(path, holdout=0.0).train
    assert isinstance(train, PackedSource)
    assert [train.load(i) for i in range(20)] == [jpeg(i) for i in range(20)]
    assert train.name(3) == "x.parquet:3 3.jpg"
    assert named(train)["x.parquet:3 3.jpg"] == "dog"
    assert pickle.loads(pickle.dumps(train)).load(4) == jpeg(4)


@pytest.mark.parametrize("kind", ["stream", "file", "compressed", "view"])
def test_arrow_files_give_the_bytes_of_every_row(tmp_path: Path, cache: Path, kind: str) -> None:
    """Images that are not compressed are read in place, without a copy in the cache."""
    table, path = hub_table(range(20)), tmp_path / "x.arrow"
    if kind == "view":
        column = table["image"].combine_chunks().field("bytes").cast(pa.binary_view())
        table = table.set_column(0, "image", column)
    if kind in ("stream", "view"):
        save_stream(table, path)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
        with pa.ipc.new_file(str(path), table.schema, options=options) as out:
            out.write_table(table, max_chunksize=6)
    train = of(path, source="hf", holdout=0.0).train
    assert [train.load(i) for i in range(20)] == [jpeg(i) for i in range(20)]
    assert cache.exists() == (kind in ("compressed", "view"))


def test_a_table_is_unpacked_once_and_anew_where_it_changed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(hub_table(range(6)), path)
    before = of(path, holdout=0.0).train

    def written() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in cache.iterdir() if f.suffix != ".lock"}

    files = written()
    assert {file.suffix for file in files} == {".images", ".parquet"}
    again = of(path, holdout=0.0).train
    assert written() == files
    assert again.fingerprint() == before.fingerprint()
    pq.write_table(hub_table(range(6, 12)), path)
    os.utime(path, ns=(1, 1))
    assert of(path, holdout=0.0).train.load(0) == jpeg(6)
    assert before.load(0) == jpeg(0)


def test_images_are_on_the_disk_before_the_table_that_tells_their_places(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that crashes in between unpacks again. A table alone would stay for ever."""
    path, synced, fsync = tmp_path / "x.parquet", list[tuple[str, list[str]]](), os.fsync
    pq.write_table(hub_table(range(6)), path)

    def record(number: int) -> None:
        fsync(number)
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        synced.append((name.partition(".")[2], sorted(f.suffix for f in cache.iterdir())))

    monkeypatch.setattr(os, "fsync", record)
    assert of(path, holdout=0.0).train.load(5) == jpeg(5)
    assert synced[0] == ("images.tmp", [".lock", ".tmp"])
    assert ("parquet.tmp", [".images", ".lock", ".tmp"]) in synced


def test_unpacking_holds_little_more_than_a_row_group(tmp_path: Path) -> None:
    """A file of 96 MB in row groups of 6 MB. Arrow decodes a row group at a time."""
    random = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    rows = pa.array([random.bytes(1 << 20) for _ in range(96)], pa.binary())
    pq.write_table(pa.table({"image": rows}), path, row_group_size=6)
    code = (
        "import sys, pyarrow, pathlib; from mocofast.data.tables import open_table\n"
        "print(len(open_table('x', pathlib.Path(sys.argv[1])).sizes))\n"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    words = [sys.executable, "-c", code, str(path)]
    out = subprocess.run(words, capture_output=True, text=True, check=True, env=runs.environment())
    count, peak = map(int, out.stdout.split())
    assert count == 96
    assert peak < 32e6


def test_rows_without_bytes_are_counted_and_bad_images_named(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(i), "path": None} for i in range(8)]
    images[2], images[4] = None, {"bytes": None, "path": "gone.jpg"}  # type: ignore[call-overload]
    images[5] = {"bytes": b"no image", "path": "bad.jpg"}
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.array(images, IMAGE)}), path)
    train, _, note, remarks = of(path)
    assert note == "6 images without labels"
    assert remarks == ("2 rows without the bytes of an image left out",)
    loader = build_loader(
        train, DataConfig(loader="torchvision", workers=0), (SMALL,), BatchSlice(6), 0, CPU
    )
    list(loader.epoch(0))
    assert [train.name(i) for i in loader.skipped] == ["x.parquet:5 bad.jpg"]


# Columns and sets


def test_columns_of_images_labels_and_groups_are_found_and_named(tmp_path: Path) -> None:
    rows = 12
    masks = pa.array([{"bytes": b"mask", "path": ""} for _ in range(rows)], IMAGE)
    table = hub_table(range(rows), mask=masks, age=[f"{i % 3}" for i in range(rows)])
    table = table.append_column("Patient", pa.array([f"p{i // 4}" for i in range(rows)]))
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    pq.write_table(table, tmp_path / "x.parquet")
    datasets = of(tmp_path, group="patient", holdout=0.3)
    assert datasets.remarks == (
        "images of column image used, mask not; --data.column mask makes the other choice",
    )
    assert datasets.val is not None
    held = {int(name.split(":")[1].split()[0]) // 4 for name in named(datasets.val)}
    assert len(held) == 1
    assert of(tmp_path, labels="age").train.classes == ("0", "1", "2")
    assert of(tmp_path, labels="none").train.labels is None
    assert of(tmp_path, column="mask").train.load(0) == b"mask"
    with pytest.raises(ConfigError, match=r"data\.column: 'age' is no column .* \(image, mask\)"):
        of(tmp_path, column="age")
    with pytest.raises(ConfigError, match=r"data\.labels: no column 'x' in x\.parquet \(label, "):
        of(tmp_path, labels="x")
    with pytest.raises(ConfigError, match=r"data\.group: no column 'x'"):
        of(tmp_path, group="x")
    kept = of(tmp_path, exclude=("*/1?.jpg",), labels="none").train
    assert len(kept) == 10


def test_classes_keep_the_order_of_their_names_and_minus_one_is_no_label(tmp_path: Path) -> None:
    table = hub_table(range(4), ("zebra", "ant", "bee"))
    table = table.set_column(1, "label", pa.array([0, 1, -1, 1]))
    pq.write_table(table, tmp_path / "x.parquet")
    train = of(tmp_path, holdout=0.0).train
    assert train.classes == ("zebra", "ant", "bee")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, -1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("imagenet-1k-train.arrow", "train"),
        ("test-data/train.parquet", "train"),
        ("trainer/0000.parquet", ""),
    ],
)
def test_names_of_files_and_folders_say_the_set(name: str, expected: str) -> None:
    assert set_of(name) == expected


def test_sets_are_told_by_files_by_a_column_and_by_options(tmp_path: Path) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    for i, name in enumerate(("train-0-of-2", "train-1-of-2", "test-0", "extra")):
        pq.write_table(hub_table(range(4 * i, 4 * i + 4)), tmp_path / f"hub/data/{name}.parquet")
    datasets = of(tmp_path / "hub")
    assert datasets.note == "8 images of 2 classes; held out: test, 4"
    assert datasets.remarks == ("data/extra.parquet not used",)
    assert datasets.val is not None
    assert datasets.val.load(1) == jpeg(9)
    other = of(tmp_path / "hub", train=("*extra*", "test"), val="train")
    assert [other.train.load(i) for i in (0, 4)] == [jpeg(12), jpeg(8)]
    assert other.note == "8 images of 2 classes; held out: train, 8"
    with pytest.raises(ConfigError, match=r"data\.val: no table of dev \(test, train\)"):
        of(tmp_path / "hub", val="dev")
    pattern = of(f"{tmp_path}/hub/data/{{train-1,test}}*.parquet")
    assert pattern.note == "4 images of 2 classes; held out: test, 4"
    column = pa.array(["train", "Valid", "train", "train", "other", "valid"])
    pq.write_table(hub_table(range(6), split=column), tmp_path / "x.parquet")
    datasets = of(tmp_path / "x.parquet")
    assert datasets.note == "3 images of 2 classes; held out: the table's evaluation images, 2"
    assert datasets.remarks == ("rows of split other not used",)
    assert set(named(of(tmp_path / "x.parquet", val="other").train)) == {
        f"x.parquet:{i} {i}.jpg" for i in (0, 2, 3)
    }


def test_a_column_without_known_sets_makes_all_rows_training_images(tmp_path: Path) -> None:
    column = pa.array(["north", "south", None, "north", "", "south"])
    pq.write_table(hub_table(range(6), split=column), tmp_path / "x.parquet")
    datasets = of(tmp_path / "x.parquet", holdout=0.0)
    assert len(datasets.train) == 6 and datasets.val is None


def test_a_folder_saved_by_datasets_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    photos = save_photos(tmp_path / "photos", 12)
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["no", "yes"])})
    rows = {"image": [str(photos / f"{i:03}.jpg") for i in range(12)], "label": [0, 1] * 6}
    every = hf.Dataset.from_dict(rows, features=features)
    sets = hf.DatasetDict({"train": every.select(range(9)), "test": every.select(range(9, 12))})
    sets.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    save_stream(hub_table(range(2)), tmp_path / "saved/train/cache-1234.arrow")
    save_stream(hub_table(range(2)), tmp_path / "saved/train/old-1234.arrow")
    for source in ("hf", "folder"):
        train, val, note, _ = of(tmp_path / "saved", source=source)
        assert note == "9 images of 2 classes; held out: test, 3"
        assert train.classes == ("no", "yes")
        assert val is not None
        read = hf.load_from_disk(str(tmp_path / "saved")).cast_column(
            "image", hf.Image(decode=False)
        )
        for part, found in (("train", train), ("test", val)):
            assert [found.load(i) for i in range(len(found))] == [
                row["image"]["bytes"] for row in read[part]
            ]
            assert found.labels is not None
            assert found.labels.tolist() == read[part]["label"][:]
    single = of(tmp_path / "saved/test", source="hf", holdout=0.0).train
    assert single.load(2) == jpeg(11)


def test_tables_are_found_under_source_folder_unless_there_are_images(tmp_path: Path) -> None:
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    pq.write_table(hub_table(range(4)), tmp_path / "x.parquet")
    assert len(of(tmp_path, source="folder", holdout=0.0).train) == 4
    assert len(of(tmp_path / "x.parquet", source="folder", holdout=0.0).train) == 4
    save_photos(tmp_path / "photos", 3)
    pq.write_table(pa.table({"file_name": ["000.jpg"]}), tmp_path / "photos/metadata.parquet")
    assert isinstance(of(tmp_path / "photos", source="folder").train, FolderSource)
    (tmp_path / "photos/0").mkdir()
    (tmp_path / "photos/000.jpg").rename(tmp_path / "photos/0/000.jpg")
    for i in (1, 2):
        (tmp_path / f"photos/00{i}.jpg").unlink()
    (tmp_path / "photos/broken.arrow").write_bytes(b"no table")
    assert isinstance(of(tmp_path / "photos", source="folder").train, FolderSource)
    (tmp_path / "photos/0/000.jpg").unlink()
    with pytest.raises(ConfigError, match=r"no image below .*tables are for data\.source=parquet"):
        of(tmp_path / "photos", source="folder")
    with pytest.raises(NotADirectoryError, match="source list reads"):
        of(tmp_path / "photos/metadata.parquet", source="folder")


def test_unusable_tables_are_errors_that_say_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no table"):
        of(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match=r"no \.parquet or \.arrow file below"):
        of(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ConfigError, match=r"ending of \.parquet, \.arrow"):
        of(tmp_path / "x.txt")
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_bytes(b"no table")
        with pytest.raises(ConfigError, match=rf"{name}' cannot be read"):
            of(tmp_path / name)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"path": ["1.png"]}), path)
    with pytest.raises(ConfigError, match=r"no column of image bytes .* \(path\); .*source list"):
        of(path)
    pq.write_table(hub_table(range(3)), path)
    with pytest.raises(ConfigError, match=r"data\.val: neither a name of a table nor a column"):
        of(path, val="dev")
    with pytest.raises(ConfigError, match=r"no image in .*3 images left out by data\.include"):
        of(path, include=("*.png",))
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    pq.write_table(hub_table(range(4)), path)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB in .* XDG_CACHE_HOME names another"):
        of(path)


# Runs


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_show_tables_as_files_and_resume_exactly(tmp_path: Path, name: str) -> None:
    root = save_photos(tmp_path / "photos")
    pq.write_table(hub_table(range(23)), tmp_path / "x.parquet", row_group_size=5)
    packed = of(tmp_path / "x.parquet", holdout=0.0).train
    names = [f"{i:03}.jpg" for i in range(23)]
    files = FolderSource(root, names, packed.labels, packed.classes)

    def stream(source: Any) -> Any:
        data = DataConfig(loader=name, workers=1)
        return build_loader(source, data, (SMALL, SMALL), BatchSlice(4), 5, CPU)

    whole = list(stream(packed).epoch(1))
    assert_same_batches(whole, stream(files).epoch(1))
    assert_same_batches(whole[2:], stream(packed).epoch(1, 2))
    batches = [EvalBatches(source, 16, 8, 2, CPU) for source in (packed, files)]
    for left, right in zip(*batches):
        assert torch.equal(left[0], right[0])


def test_a_run_on_a_table_resumes_exactly_and_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, rows in (("train", range(16)), ("validation", range(16, 24))):
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(hub_table(rows), tmp_path / f"set/{part}-0.parquet")
    common = (
        *("pretrain", "digits", "--model.arch", "resnet_tiny", "--augment.size", "16"),
        *("--data.batch_size", "8", "--data.workers", "0", "--data.loader", "torchvision"),
        *("--data.source", "hf", "--data.path", str(tmp_path / "set"), "--knn.k", "3"),
        *("--train.log_every", "1"),
    )
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert cli.main([*common, "--train.dir", whole, "--train.max_steps", "4"]) == 0
    assert "data: 16 images of 2 classes; held out: validation, 8" in capsys.readouterr().out
    for steps in ("1", "4"):
        arguments = (*common, "--train.dir", parts, "--train.max_steps", steps)
        assert cli.main([*arguments, "--resume", "auto"]) == 0
    assert runs.metrics(Path(parts)) == runs.metrics(Path(whole))
    assert cli.main(["knn", whole, "--knn.k", "3"]) == 0
    assert cli.main(["linear", whole]) == 0
    assert cli.main(["stats", str(tmp_path / "set"), "--source", "parquet"]) == 0
    out = capsys.readouterr().out
    assert "16 images measured, 0 left out" in out
    assert "linear_top1" in out


def test_tables_are_prepared_as_shards(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part, rows in (("train", range(6)), ("test", range(6, 10))):
        pq.write_table(hub_table(rows), tmp_path / f"set/{part}-0.parquet")
    prepare(str(tmp_path / "set"), str(tmp_path / "out"), PrepareConfig(size=256))
    shards = of(tmp_path / "out", source="shards")
    assert shards.note == "6 images of 2 classes; held out: val/, 4"
    labels = named(shards.train)
    images = {shards.train.name(i): shards.train.load(i) for i in range(6)}
    for i in range(6):
        name = f"train/shard-000000.tar:train-0_parquet/{i}/{i}"
        assert images[name] == jpeg(i)
        assert labels[name] == ("cat", "dog")[i % 2]
