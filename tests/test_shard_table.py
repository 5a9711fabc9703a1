"""The kept table of a large set of shards: mapped, equal to one in memory, made anew if needed."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from mocofast.config import DataConfig
from mocofast.data import shard_index, shard_table
from mocofast.data.columns import Column
from mocofast.data.shard_places import find_shards
from mocofast.data.shards import ShardSource, open_shards
from mocofast.data.sources import load_datasets
from tests.test_shards import write_tar

COUNTS = (7, 4, 6)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Writes labelled shards, in which some images have captions and one has no label."""
    first = 0
    for number, count in enumerate(COUNTS):
        members = []
        for i in range(first, first + count):
            members.append((f"sample{'x' * number}{i}.jpg", b"image %d" % i))
            members += [(f"sample{'x' * number}{i}.cls", b"%d" % (i % 3))] * (i != 5)
            members += [(f"sample{'x' * number}{i}.txt", b"text %d" % i)] * (i % 2)
        write_tar(tmp_path / "set" / f"{number}.tar", members)
        first += count
    return tmp_path / "set"


def opened(shards: Path, window: int = 0) -> ShardSource:
    return open_shards(find_shards(str(shards)), window, captions=True)


def everything(source: ShardSource) -> list[object]:
    numbers = range(len(source))
    return [
        [(source.name(i), source.load(i), source.caption(i)) for i in numbers],
        None if source.labels is None else source.labels.tolist(),
        source.classes,
        source.fingerprint(),
        source.order(3, 1).tolist(),
        source.has_caption.tolist() if source.has_caption is not None else None,
        source.remarks,
    ]


@pytest.mark.parametrize("window", [0, 2])
def test_a_kept_table_equals_a_table_in_memory_and_reads_no_index(
    shards: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = opened(shards, window)
    part = np.array([1, 5, 8, 9, 16])
    expected = everything(memory), everything(memory.subset(part))
    assert not isinstance(memory._table.keys, Column)
    monkeypatch.setattr(shard_table, "FEWEST", 10)
    assert everything(opened(shards, window)) == expected[0]  # makes the table
    monkeypatch.setattr(shard_table, "_each", None)
    kept = opened(shards, window)
    assert isinstance(kept._table.keys, Column) and isinstance(kept.labels, Column)
    assert everything(kept) == expected[0]
    assert everything(kept.subset(part)) == expected[1]
    with pytest.raises(ValueError, match="read-only"):
        kept._table.offsets[0] = 1


def test_labels_that_change_change_the_fingerprint_of_a_kept_table(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = DataConfig(source="shards", path=str(shards), labels="0.5", holdout=0.0)
    expected = load_datasets(few).train.fingerprint()
    monkeypatch.setattr(shard_table, "FEWEST", 10)
    for _ in range(2):
        source = load_datasets(few).train
        assert source.fingerprint() == expected != opened(shards).fingerprint()


def test_a_start_reads_no_names_of_photos(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 million names took 90 s and 750 MiB."""
    data = DataConfig(source="shards", path=str(shards), holdout=0.0)
    monkeypatch.setattr(ShardSource, "name", None)
    assert len(load_datasets(data).train) == sum(COUNTS)


@pytest.mark.parametrize("change", ["time", "content", "more", "classes", "bit", "cut", "user"])
def test_a_table_of_another_state_is_made_anew(
    shards: Path, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "FEWEST", 10)
    opened(shards)
    (place,) = cache.rglob("*.columns")
    content = bytearray(place.read_bytes())
    if change == "time":
        os.utime(shards / "1.tar", ns=(time.time_ns(), time.time_ns()))
    elif change == "content":
        write_tar(shards / "1.tar", [("other.jpg", b"other"), ("other.cls", b"1")])
    elif change == "more":
        write_tar(shards / "9.tar", [("other.jpg", b"other"), ("other.cls", b"1")])
    elif change == "classes":
        (shards / "meta.json").write_text('{"classes": ["a", "b", "c"]}')
    elif change == "bit":
        content[3] ^= 1
        place.write_bytes(content)
    elif change == "cut":
        place.write_bytes(content[:-30])
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    each, made = shard_table._each, []
    monkeypatch.setattr(shard_table, "_each", lambda *given: made.append(1) or each(*given))
    found = everything(opened(shards))
    assert made
    monkeypatch.setattr(shard_table, "FEWEST", 100)
    assert found == everything(opened(shards))
    if change == "classes":
        assert found[2] == ("a", "b", "c")


def test_a_table_that_cannot_be_kept_is_in_memory(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(opened(shards))
    monkeypatch.setattr(shard_table, "FEWEST", 10)
    cache.joinpath("mocofast").mkdir(parents=True)
    cache.joinpath("mocofast", "shard_tables").write_text("no folder")
    assert everything(opened(shards)) == expected


def test_a_worker_maps_the_file_itself(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "FEWEST", 10)
    source = opened(shards)
    packed = pickle.dumps(source)
    assert b"sample1" not in packed
    assert everything(pickle.loads(packed)) == everything(source)
    part = source.subset(np.arange(3, 9))
    assert everything(pickle.loads(pickle.dumps(part))) == everything(part)
    (place,) = cache.rglob("*.columns")
    os.utime(place)
    with pytest.raises(OSError, match="was replaced"):
        pickle.loads(packed)


def test_offsets_of_large_shards(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets beyond 4 GiB need 8 bytes."""
    tar = write_tar(tmp_path / "large" / "0.tar", [("a.jpg", b"a"), ("b.jpg", b"b")])
    index = shard_index.local_index(tar)
    far = index.members._replace(offsets=np.array([512, 5 << 32]))
    monkeypatch.setattr(shard_table, "FEWEST", 2)
    large = index._replace(shard_size=6 << 32, members=far)
    monkeypatch.setattr(shard_table, "local_index", lambda *given: large)
    source = opened(tmp_path / "large")
    assert isinstance(source._table.offsets, Column)
    assert source._table.offsets.tolist() == [512, 5 << 32]
