"""`mocofast prepare`: the stored images, labels and shards, and errors on the way."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.cli import main
from mocofast.config import ConfigError, DataConfig
from mocofast.data import prepare as module
from mocofast.data.decoding import decode
from mocofast.data.prepare import PrepareConfig, compact, prepare
from mocofast.data.shard_index import INDEX
from mocofast.data.shards import ShardSource
from mocofast.data.sources import load_datasets
from tests.pictures import photo, put_images, shard_datasets


def write(root: Path, *names: str, size: tuple[int, int] = (60, 90)) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i, size).save(path, quality=90)
    return root


def samples(source: ShardSource) -> dict[str, tuple[str, bytes]]:
    """Returns {key: (class, content)}."""
    assert source.labels is not None
    return {
        source.name(i).split(":")[1]: (source.classes[source.labels[i]], source.load(i))
        for i in range(len(source))
    }


def test_large_images_are_shrunk_and_others_copied_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.JPG"
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    photo(0, (100, 151)).save(path, "JPEG", quality=95, exif=exif)
    extension, content = compact(str(path), 100, 95)
    assert (extension, content) == (".jpg", path.read_bytes())
    extension, content = compact(str(path), 50, 95)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        assert image.size == (76, 50)  # 75.5, and not turned
        assert not image.getexif()
        # 4:4:4
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
        expected = decode(str(path)).resize((76, 50), Image.Resampling.LANCZOS)
        error = np.asarray(image).astype(int) - np.asarray(expected)
        assert 0 < np.abs(error).mean() < 1  # JPEG at quality 95 of a smooth picture
    assert len(compact(str(path), 50, 30)[1]) < len(content)


def test_labels_train_and_val_and_names_are_the_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        "train/ant/v1.5.jpg",
        "train/ant/v1_5.jpg",
        "train/bee/3.png",
        "val/bee/4.jpg",
        "val/ant/deep/5.jpg",
    ]
    source = write(tmp_path / "in", *names)
    (source / "train/bee/bad.jpg").write_bytes((source / names[0]).read_bytes()[:400])
    out = tmp_path / "out"
    assert main(["prepare", str(source), str(out), "--size", "40"]) == 0
    printed = capsys.readouterr().out
    assert "left out: train/bee/bad.jpg: OSError" in printed
    assert f"5 images in {out};" in printed
    train, val, _ = shard_datasets(out)
    assert val is not None
    assert train.classes == val.classes == ("ant", "bee")
    found = samples(train)
    assert {(key.split("-")[0], kind) for key, (kind, _) in found.items()} == {
        ("ant/v1_5", "ant"),
        ("bee/3", "bee"),
    }
    assert len(found) == 3  # names that differ by a dot only stay apart
    assert {key: kind for key, (kind, _) in samples(val).items()} == {
        "bee/4": "bee",
        "ant/deep/5": "ant",
    }
    assert all(decode(content).size == (60, 40) for _, content in found.values())
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["classes"], meta["images"], meta["size"]) == (
        ["ant", "bee"],
        {"train": 3, "val": 2},
        40,
    )
    assert list(meta["skipped"]) == ["train/bee/bad.jpg"]
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "shard-000000.tar",
        f"shard-000000.tar{INDEX}",
    ]


def test_shards_end_at_their_size_mix_the_classes_and_are_the_same_each_time(
    tmp_path: Path,
) -> None:
    # 200 images of about 100 kB, uncompressed and so copied: 20 shards of 1 MB.
    pixels = np.random.default_rng(0).integers(0, 256, (200, 180, 180, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "in" / f"class{i // 100}" / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for out in ("a", "b"):
        prepare(str(tmp_path / "in"), str(tmp_path / out), PrepareConfig(shard_mb=1))
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert [path.name for path in shards] == [f"shard-{i:06}.tar" for i in range(len(shards))]
    assert len(shards) in (19, 20)
    assert all(1e6 <= path.stat().st_size < 1.2e6 for path in shards[:-1])
    again = sorted((tmp_path / "b").glob("*.tar"))
    assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in again]
    train, val, _ = shard_datasets(tmp_path / "a", holdout=0.0)
    assert val is None
    assert train.labels is not None
    assert sorted(train.load(i) for i in range(200)) == sorted(
        path.read_bytes() for path in tmp_path.rglob("*.bmp")
    )
    # Of the 100 images of the second class, 50 are expected in the first half. The
    # standard deviation is 5.
    assert 30 < train.labels[:100].sum() < 70


def test_an_unlabelled_folder_makes_unlabelled_shards(tmp_path: Path) -> None:
    meta = prepare(
        str(write(tmp_path / "in", "b.jpg", "a.jpg")), str(tmp_path / "out"), PrepareConfig()
    )
    assert meta["images"] == {"all": 2}
    train, *_ = shard_datasets(tmp_path / "out")
    assert train.labels is None
    assert sorted(train.name(i) for i in range(2)) == ["shard-000000.tar:a", "shard-000000.tar:b"]


def test_nothing_is_overwritten_and_nothing_is_left_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", "a.jpg", "b.jpg"), tmp_path / "out"
    out.mkdir()
    assert main(["prepare", str(source), str(out)]) == 2
    assert "is there already; nothing is overwritten" in capsys.readouterr().err
    out.rmdir()
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ConfigError, match=r"out\.partial' is there: another run's"):
        prepare(str(source), str(out), PrepareConfig())
    (tmp_path / "out.partial").rmdir()

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "local_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), str(out), PrepareConfig())
    for name in ("a.jpg", "b.jpg"):
        (source / name).write_bytes(b"no image")
    with pytest.raises(
        ConfigError, match=r"none of the 2 images can be decoded; .*UnidentifiedImageError"
    ):
        prepare(str(source), str(out), PrepareConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_shard_that_an_error_ends_halfway_is_not_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", *(f"{i}.jpg" for i in range(5)))
    left = iter(range(3))
    # Writing the fourth image raises StopIteration.
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: next(left))
    monkeypatch.setattr(module, "local_index", lambda path: pytest.fail(f"indexed {path}"))
    with pytest.raises(StopIteration):
        prepare(str(source), str(tmp_path / "out"), PrepareConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "0", "at least 1"),
        ("--quality", "101", "1 to 100"),
        ("--shard-mb", "0", "at least 1"),
    ],
)
def test_unusable_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert (
        main(
            ["prepare", str(write(tmp_path / "in", "a.jpg")), str(tmp_path / "out"), option, value]
        )
        == 2
    )
    assert f"{option}: expected {message}, got {value}" in capsys.readouterr().err


@pytest.mark.data
def test_real_photos_keep_what_the_help_text_says(photos: Path, tmp_path: Path) -> None:
    """20 photos take half the bytes, and look like the originals when shrunk to views."""
    names = sorted(photos.rglob("*.JPEG"))[::25]
    (tmp_path / "in").mkdir()
    for path in names:
        shutil.copy(path, tmp_path / "in")
    prepare(str(tmp_path / "in"), str(tmp_path / "out"), PrepareConfig())
    train, *_ = shard_datasets(tmp_path / "out")
    total = sum(path.stat().st_size for path in names)
    assert 0.3 < sum(len(train.load(i)) for i in range(len(train))) / total < 0.7
    for i in range(len(train)):
        original = next(path for path in names if path.stem == train.name(i).split(":")[1])
        views = [
            np.asarray(decode(item).resize((224, 224), Image.Resampling.BILINEAR)).astype(float)
            for item in (train.load(i), str(original))
        ]
        assert np.abs(views[0] - views[1]).mean() < 4  # whole images: 1 to 3


def test_a_wrapper_folder_and_unlabeled_images_keep_train_val_and_labels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part in ("train", "valid"):
        put_images(source, *(f"Set/{part}/{k}/{i}.png" for k in "ab" for i in range(2)))
    put_images(source, *(f"Set/unlabeled/{i}.png" for i in range(3)))
    (source / "Set" / "train" / "notes.txt").write_text("text")
    meta = prepare(str(source), str(tmp_path / "out"), PrepareConfig(workers=1))
    assert meta["images"] == {"train": 7, "val": 4}
    assert meta["remarks"] == ["1 file of other kinds ignored: 1 .txt"]
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path / "out")))
    assert datasets.note == "7 images of 2 classes, 3 unlabelled; held out: val/, 4"
    assert datasets.train.classes == ("a", "b")
