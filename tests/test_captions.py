"""Captions of lists, tables and tar shards stay with their images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import ConfigError, DataConfig
from mocofast.data.captions import captions_of
from mocofast.data.interface import Source
from mocofast.data.shard_index import INDEX, local_index
from mocofast.data.sources import Datasets, load_datasets


def image(level: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(content, "PNG")
    return content.getvalue()


def captions(source: Source) -> list[str]:
    return captions_of(source, torch.arange(len(source)))


def of_pairs(path: Path, **options: Any) -> Datasets:
    return load_datasets(DataConfig(path=str(path), **options), captions=True)


def a_list(folder: Path, header: str, *rows: str) -> Path:
    for name in "abc":
        (folder / f"{name}.png").write_bytes(image(0))
    (folder / "list.csv").write_text("\n".join([header, *rows]))
    return folder / "list.csv"


def test_a_list_has_a_column_of_captions_and_images_may_have_several(tmp_path: Path) -> None:
    path = a_list(
        tmp_path,
        "path,Caption,other",
        "a.png,a cat,A",
        'b.png,"a dog, asleep",B',
        "a.png,the same cat,C",
        "c.png,,D",
    )
    sets = of_pairs(path, source="list")
    assert captions(sets.train) == ["a cat", "a dog, asleep", "the same cat"]
    assert [sets.train.name(i) for i in range(3)] == ["a.png", "b.png", "a.png"]
    assert "1 image without a caption left out" in sets.lines()
    named = of_pairs(path, source="list", captions="other")
    assert captions(named.train) == ["A", "B", "C", "D"]
    assert named.train.fingerprint() != of_pairs(path, source="list").train.fingerprint()
    without = load_datasets(DataConfig(source="list", path=str(path)))
    assert len(without.train) == 4  # other methods take all images
    with pytest.raises(ConfigError, match=r"data.captions: no column 'missing'"):
        of_pairs(path, source="list", captions="missing")


def test_captions_go_with_labels_and_a_hold_out(tmp_path: Path) -> None:
    rows = [f"{'abc'[i % 3]}.png,{'xy'[i % 2]},caption {i}" for i in range(40)]
    sets = of_pairs(a_list(tmp_path, "path,label,text", *rows), source="list", holdout=0.25)
    assert sets.val is not None and sets.train.labels is not None
    assert len(sets.train) + len(sets.val) == 40
    for i, text in enumerate(captions(sets.train)):
        row = int(text.split()[1])
        assert sets.train.name(i) == f"{'abc'[row % 3]}.png"
        assert sets.train.classes[sets.train.labels[i]] == "xy"[row % 2]


def test_a_set_without_captions_is_refused(tmp_path: Path) -> None:
    path = a_list(tmp_path, "path,label", "a.png,x", "b.png,y")
    for options in ({"source": "list"}, {"source": "list", "captions": "none"}):
        with pytest.raises(ConfigError, match=r"data.captions: .* needs captions"):
            of_pairs(path, **options)
    with pytest.raises(ConfigError, match=r"data.captions: .* data.source=digits has none"):
        load_datasets(DataConfig(source="digits"), captions=True)


def test_equal_captions_are_said(tmp_path: Path) -> None:
    rows = [f"{name}.png,a cat" for name in "abc"]
    assert (
        "3 images looked at have 1 different captions"
        in of_pairs(a_list(tmp_path, "path,caption", *rows), source="list").lines()
    )


def test_a_table_has_a_column_of_captions(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {
        "image": [{"bytes": image(i), "path": f"{i}.png"} for i in range(4)],
        "text": ["zero", "one", None, "three"],
    }
    parquet.write_table(pa.table(rows), tmp_path / "train.parquet")
    sets = of_pairs(tmp_path, source="parquet")
    assert captions(sets.train) == ["zero", "one", "three"]
    assert sets.train.load(2) == image(3)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_have_captions_beside_images(tmp_path: Path) -> None:
    long = "x" * 700  # is not read with its header
    shard(
        tmp_path / "0.tar",
        {
            "a.jpg": image(0),
            "a.txt": b" a cat \n",
            "b.txt": "Gr\u00fc\u00dfe".encode(),
            "b.png": image(1),
            "c.png": image(2),
            "d.rgb.png": image(3),
            "d.txt": long.encode(),
            "readme.txt": b"no caption",
        },
    )
    shard(tmp_path / "1.tar", {"e.png": image(4), "e.txt": b"last"})
    sets = of_pairs(tmp_path, source="shards")
    assert captions(sets.train) == ["a cat", "Gr\u00fc\u00dfe", long, "last"]
    assert sets.train.load(1) == image(1)
    assert "1 image without a caption left out" in sets.lines() and ".txt" not in sets.lines()
    # Methods without texts take all images, and say what they leave out.
    plain = load_datasets(DataConfig(source="shards", path=str(tmp_path)))
    assert len(plain.train) == 5 and ".txt" in plain.lines()


def test_an_index_without_captions_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    shard(path, {"a.jpg": image(0), "a.txt": b"a cat"})
    local_index(path)
    place = Path(f"{path}{INDEX}")
    with np.load(place) as kept:
        columns = {name: kept[name] for name in kept.files if not name.startswith("text_")}
    columns["stamp"][0] = 3
    with place.open("wb") as file:
        np.savez(file, **columns)
    assert captions(of_pairs(tmp_path, source="shards").train) == ["a cat"]


def test_readers_of_files_keep_captions(tmp_path: Path) -> None:
    path = a_list(tmp_path, "path,caption", "a.png,one", "b.png,two")
    sets = of_pairs(path, source="list", bands=(1, 2, 3))
    assert captions(sets.train) == ["one", "two"]
