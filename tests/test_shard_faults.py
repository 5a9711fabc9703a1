"""Damaged and hostile shards and indexes: an error that names the shard, or a new index."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from mocofast.config import ConfigError, DataConfig
from mocofast.data import shard_index
from mocofast.data.braces import MOST_NAMES, expand_braces
from mocofast.data.shard_index import INDEX, UnreadableIndex, local_index, read_index
from mocofast.data.shard_places import find_shards
from mocofast.data.shards import ShardSource, open_shards
from mocofast.data.sources import load_datasets
from tests.pictures import jpeg

COUNT = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return put(tmp_path / "x.tar", {f"{i:02}.jpg": jpeg(i) for i in range(COUNT)})


def starts(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def opened(path: Path) -> ShardSource:
    return open_shards(find_shards(str(path)))


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a whole, uncompressed tar file") as caught:
        opened(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_in_a_header_is_an_error_and_loses_no_image_silently(shard: Path) -> None:
    whole = shard.read_bytes()
    for start in starts(shard)[1::6]:
        for field in (0, 60, 108, 124, 140, 149, 156, 260, 300):
            content = bytearray(whole)
            content[start + field] ^= 1
            message = refused(shard, bytes(content))
            assert f"header at byte {start:,}" in message


def test_a_shard_cut_between_members_is_an_error(shard: Path) -> None:
    whole = shard.read_bytes()
    for start in (*starts(shard)[1::6], len(whole.rstrip(b"\0")) // 512 * 512 + 512):
        assert "cut off: no end of the archive" in refused(shard, whole[:start])


def test_a_header_of_zeros_and_a_second_archive_are_errors(shard: Path) -> None:
    whole, start = shard.read_bytes(), starts(shard)[7]
    zeroed = whole[:start] + bytes(512) + whole[start + 512 :]
    assert f"members behind byte {start:,}" in refused(shard, zeroed)
    assert "several archives in one file" in refused(shard, whole + whole)


def test_one_block_of_zeros_is_an_end(shard: Path) -> None:
    whole = shard.read_bytes()
    end = len(whole) - 10240 + len(whole[-10240:].rstrip(b"\0"))
    shard.write_bytes(whole[: -(-end // 512) * 512 + 512])
    assert len(opened(shard)) == COUNT


def test_an_index_of_an_older_version_is_made_again(shard: Path) -> None:
    """Older versions indexed the members before the damage."""
    index = Path(f"{shard}{INDEX}")
    local_index(shard)
    columns = dict(np.load(index))
    columns["stamp"][0] = 2
    np.savez(index, **columns)
    assert len(read_index(index).keys) == COUNT  # a server's
    content = bytearray(shard.read_bytes())
    content[starts(shard)[9] + 5] ^= 8
    stat = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match="damaged"):
        local_index(shard)


@pytest.mark.parametrize("collects", [True, False])
def test_the_collection_of_cycles_goes_on_after_an_index(shard: Path, collects: bool) -> None:
    during = []
    scan = shard_index._scan

    def noted(path: Path, extensions: Any) -> Any:
        during.append(gc.isenabled())
        return scan(path, extensions)

    try:
        (gc.enable if collects else gc.disable)()
        with mock.patch.object(shard_index, "_scan", noted):
            local_index(shard)
            assert gc.isenabled() == collects
            Path(f"{shard}{INDEX}").unlink()
            shard.write_bytes(shard.read_bytes()[:700])
            with pytest.raises(ConfigError):
                local_index(shard)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert during == [False, False]


def header(name: str, size: int, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    if field is not None:
        block[124:136] = field
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "member",
    [
        header("n.jpg", 0, field=b"\xff" * 11 + b"\0"),  # -256 bytes
        header("n.jpg", 0, field=b"\x80" + b"\x7f" * 11),  # more than a disk holds
        header("n.jpg", 0, field=b"77777777777\0"),  # 8 GiB
        header("n", 0, b"x") * 3000,  # headers that describe headers
        header("n", 0, b"L", field=b"77777777777\0"),  # a name of 8 GiB
    ],
)
def test_hostile_headers_are_errors(shard: Path, member: bytes) -> None:
    whole, start = shard.read_bytes(), starts(shard)[3]
    refused(shard, whole[:start] + member + whole[start:])


def test_hostile_labels_are_no_labels_or_take_little_memory(tmp_path: Path) -> None:
    labels = {"a": b"[" * 200_000, "b": b'{"label": ' + b"[" * 200_000, "c": b"9" * 4000}
    labels |= {"d": b'{"label": ' + b"7" * 4000 + b"}", "e": b'{"label": 1e12}', "f": b"-1"}
    members = {}
    for key, label in labels.items():
        members |= {f"{key}.jpg": jpeg(1), f"{key}.json": label, f"{key}.cls": label}
    source = opened(put(tmp_path / "x.tar", members))
    assert (len(source), source.labels) == (6, None)
    members = {}
    for i in range(4):
        members |= {f"{i}.jpg": jpeg(i), f"{i}.cls": str(i % 2 * 10**12).encode()}
    source = opened(put(tmp_path / "y.tar", members))
    assert source.classes == ("0", "1000000000000")
    (tmp_path / "meta.json").write_text("[" * 200_000)
    assert opened(tmp_path / "y.tar").classes == source.classes


def test_members_that_no_image_can_be_are_counted(tmp_path: Path) -> None:
    members = {"a.jpg": jpeg(1), f"{'n' * 5000}.jpg": jpeg(2), "a.json": b" " * (16 << 20) + b"0"}
    source = opened(put(tmp_path / "x.tar", members))
    assert len(source) == 1
    assert "1 members with names of more than 4,096 characters" in source.remarks[0]
    assert "1 label files of more than 16 MiB" in source.remarks[0]


def change(columns: dict[str, np.ndarray], name: str, value: Any) -> dict[str, Any]:
    changed = value(columns[name]) if callable(value) else np.asarray(value)
    return {**columns, name: changed}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sizes", lambda x: -x),
        ("sizes", lambda x: x + 2**40),
        ("sizes", lambda x: x[:3]),
        ("sizes", lambda x: x + (2**63 - 1 - x.max())),
        ("offsets", lambda x: -x),
        ("offsets", lambda x: x.astype(float)),
        ("offsets", lambda x: x[:, None]),
        ("chosen", lambda x: x + 100),
        ("chosen", lambda x: x[:5]),
        ("labels", lambda x: x + 10**12),
        ("labels", lambda x: x - 10**12),
        ("keys", lambda x: np.arange(len(x))),
        ("keys", lambda x: np.array([{}] * len(x), dtype=object)),
        ("names", lambda x: x[:1]),
        ("stamp", 3),
        ("left_out", "[" * 200_000),
        ("left_out", json.dumps({"kinds": 1})),
        ("left_out", json.dumps({"twin": ["a"]})),
        ("member_left_out", json.dumps({"hidden files": "many"})),
        ("member_left_out", "[]"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_and_made_again(
    shard: Path, name: str, value: Any
) -> None:
    index = Path(f"{shard}{INDEX}")
    expected = [opened(shard).load(i) for i in range(COUNT)]
    columns = dict(np.load(index))
    np.savez(index, **change(columns, name, value))
    with pytest.raises(UnreadableIndex):
        read_index(index)
    source = opened(shard)
    assert [source.load(i) for i in range(COUNT)] == expected
    assert len(read_index(index).keys) == COUNT


def test_an_index_takes_no_more_memory_than_its_file(shard: Path) -> None:
    index = Path(f"{shard}{INDEX}")
    local_index(shard)
    columns = dict(np.load(index))
    np.savez_compressed(index, **{**columns, "offsets": np.zeros(2**22, dtype=np.int64)})
    assert index.stat().st_size < 2**17
    with pytest.raises(UnreadableIndex, match="compressed"):
        read_index(index)
    # Headers that state more numbers than follow, and text that is no header.
    for wrong in (b"(24444444444,), }", b"(24,), {         "):
        np.savez(index, **columns)
        content = index.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(index, "w") as new:
            for member in old.infolist():
                body = old.read(member)
                new.writestr(member.filename, body.replace(b"(24,), }         ", wrong))
        assert wrong in index.read_bytes()
        with pytest.raises(UnreadableIndex):
            read_index(index)
    assert len(local_index(shard).keys) == COUNT


def test_patterns_stand_for_a_limited_number_of_names() -> None:
    assert len(expand_braces("x{00..99}-{0..99}-{a,b}.tar")) == 20_000
    assert expand_braces("x{08..10}-{a,b}") == [
        f"x{i:02}-{end}" for i in range(8, 11) for end in "ab"
    ]
    assert expand_braces("{a}" * 2000) == ["a" * 2000]
    assert expand_braces("x{3..1}") == []
    for pattern in (
        "x{0..99}{0..99}{0..99}.tar",
        "{a,b}" * 1000,
        "x{0..999999999999999999}",
        f"x{{0..{MOST_NAMES}}}",
    ):
        with pytest.raises(ConfigError, match=r"data\.path: .* names, expected at most 100,000"):
            expand_braces(pattern)
    assert len(expand_braces("x{0..%s}" % ("9" * 5000))) == 1  # no number


def test_numbers_of_thousands_of_digits_are_names_of_classes_in_a_list(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    rows = "".join(f"{i}.jpg,{('9' * 5000, '1')[i % 2]}\n" for i in range(4))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    data = DataConfig(source="list", path=str(tmp_path / "list.csv"), holdout=0.0)
    assert len(load_datasets(data).train.classes) == 2
