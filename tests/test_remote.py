"""Images at URLs: folders, lists, zip archives, tables and shards of storages and HTTP servers."""

from __future__ import annotations

import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data import download as downloads
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.remote import RemoteSource
from mocofast.data.sources import Datasets, load_datasets
from tests.pictures import assert_same_batches, jpeg, named

fsspec = pytest.importorskip("fsspec")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    return tmp_path / "cache/mocofast"


@pytest.fixture
def store() -> Iterator[Any]:
    """Returns fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def of(path: Path | str, source: str = "folder", **options: Any) -> Datasets:
    return load_datasets(DataConfig(source=source, path=str(path), **options))


def put_folder(root: Path, store: Any = None, at: str = "/set") -> None:
    """Writes train/ and val/ with classes a and b, to a folder and to a storage."""
    for part, start in (("train", 0), ("val", 8)):
        for i in range(start, start + 8):
            path = root / part / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
            if store is not None:
                store.pipe_file(f"{at}/{part}/{'ab'[i % 2]}/{i}.jpg", jpeg(i))


def tar_of(rows: range) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in rows:
            for name, content in ((f"{i}.jpg", jpeg(i)), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def stream(source: Any, workers: int = 0) -> Any:
    data = DataConfig(loader="torchvision", workers=workers)
    small = AugmentConfig(size=19, jitter_p=0.8, blur=0.5)
    return build_loader(source, data, (small, small), BatchSlice(4), 5, CPU)


def test_a_folder_of_a_storage_is_the_folder_it_was_copied_from(
    tmp_path: Path, store: Any, cache: Path
) -> None:
    put_folder(tmp_path / "set", store)
    remote, local = of("memory://set"), of(tmp_path / "set")
    assert remote.note == local.note
    assert remote.train.fingerprint() == local.train.fingerprint()
    assert isinstance(remote.train, RemoteSource)
    whole = list(stream(remote.train, workers=1).epoch(1))
    assert_same_batches(whole, stream(local.train).epoch(1))
    assert_same_batches(whole[1:], stream(remote.train).epoch(1, 1))
    # The copies serve later epochs without the storage.
    store.store.clear()
    left, right = (Path(str(source.load(3))) for source in (remote.train, local.train))
    assert left.read_bytes() == right.read_bytes()
    assert len(list((cache / "images").rglob("*.jpg"))) == 8


def test_lists_of_a_storage_name_files_and_urls(tmp_path: Path, store: Any) -> None:
    put_folder(tmp_path / "set", store)
    store.pipe_file("/set/x.csv", b"path,label\nset/train/a/0.jpg,a\ntrain/b/1.jpg,b\n")
    train = of("memory://set/x.csv", "list", holdout=0.0).train
    assert train.name(1) == "train/b/1.jpg"
    store.pipe_file("/set/x.csv", b"path,label\nmemory://set/val/a/8.jpg,a\nmemory://up.jpg,b\n")
    store.pipe_file("/up.jpg", jpeg(3))
    train = of("memory://set/x.csv", "list", holdout=0.0).train
    assert Path(str(train.load(0))).read_bytes() == jpeg(8)
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]


def test_a_missing_image_is_skipped_and_named_and_a_broken_storage_ends_the_run(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_folder(tmp_path / "set", store)
    train = of("memory://set").train
    store.rm("/set/train/a/2.jpg")
    loader = stream(train)
    list(loader.epoch(0))
    assert [train.name(i) for i in loader.skipped] == ["train/a/2.jpg"]
    calls = []

    def broken(path: str, start: int = 0, end: int = 0) -> bytes:
        calls.append(path)
        raise RuntimeError("connection lost")

    monkeypatch.setattr(store, "cat_file", broken)
    other = of("memory://set/val", holdout=0.0).train
    with pytest.raises(
        OSError, match=r"cannot fetch memory://set/val/a/10\.jpg: .*connection lost"
    ):
        other.load(0)
    assert len(calls) == downloads.ATTEMPTS


def test_a_transfer_continues_in_pieces_after_an_error(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 40
    store.pipe_file("/x.bin", content)
    monkeypatch.setattr(downloads, "PIECE", 1000)
    read, pieces, failed = store.cat_file, [], []

    def flaky(path: str, start: int = 0, end: int = 0) -> bytes:
        if start == 3000 and not failed:
            failed.append(start)
            raise RuntimeError("reset")
        pieces.append(start)
        found: bytes = read(path, start=start, end=end)
        return found

    monkeypatch.setattr(store, "cat_file", flaky)
    assert downloads.download("memory://x.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == content
    assert pieces == list(range(0, len(content), 1000))


def test_archives_and_tables_of_a_storage_are_those_of_a_disk(tmp_path: Path, store: Any) -> None:
    put_folder(tmp_path / "set")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((tmp_path / "set").rglob("*.jpg")):
            archive.write(file, file.relative_to(tmp_path / "set"))
    store.pipe_file("/x.zip", packed.getvalue())
    found = of("memory://x.zip", "zip")
    assert found.train.fingerprint() == of(tmp_path / "set").train.fingerprint()
    assert found.train.load(0) == jpeg(0)
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for part, start in (("train", 0), ("test", 6)):
        table = pa.table({"image": [jpeg(i) for i in range(start, start + 6)], "label": [0, 1] * 3})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        store.pipe_file(f"/hub/data/{part}-0.parquet", buffer.getvalue())
    for source in ("parquet", "folder"):
        datasets = of("memory://hub", source)
        assert datasets.note == "6 images of 2 classes; held out: test, 6"
        assert datasets.train.load(5) == jpeg(5)
        assert datasets.train.name(5) == "data/train-0.parquet:5"
    assert len(of("memory://hub/data/te*.parquet", "parquet", holdout=0.0).train) == 6


def test_shards_of_a_storage_are_found_by_folder_pattern_and_braces(store: Any) -> None:
    for i, part in enumerate(("train", "train", "val")):
        store.pipe_file(f"/s/{part}/x-{i}.tar", tar_of(range(4 * i, 4 * i + 4)))
    datasets = of("memory://s", "shards")
    assert datasets.note == "8 images of 2 classes; held out: val/, 4"
    assert datasets.train.load(5) == jpeg(5)
    assert named(datasets.train)["train/x-1.tar:5"] == "1"
    for path in ("memory://s/train/x-*.tar", "memory://s/train/x-{0..1}.tar"):
        train = of(path, "shards", holdout=0.0).train
        assert [train.load(i) for i in range(8)] == [jpeg(i) for i in range(8)]


def test_http_servers_serve_lists_archives_and_tables(tmp_path: Path) -> None:
    root = tmp_path / "www"
    put_folder(root / "set")
    (root / "x.csv").write_text("path,label\nset/train/a/0.jpg,a\nset/train/b/1.jpg,b\n")
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        archive.write(root / "set/val/a/8.jpg", "8.jpg")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        train = of(f"{url}/x.csv", "list", holdout=0.0).train
        assert Path(str(train.load(1))).read_bytes() == jpeg(1)
        assert of(f"{url}/x.zip", "zip").train.load(0) == jpeg(8)
        with pytest.raises(FileNotFoundError, match=r"no file http://.*/none\.zip"):
            of(f"{url}/none.zip", "zip")
        with pytest.raises(ConfigError, match="folders of HTTP servers cannot be listed"):
            of(f"{url}/set")
        (root / "set/train/a/0.jpg").unlink()
        assert not Path(str(train.load(0))).exists()
    finally:
        server.shutdown()
        server.server_close()


def test_urls_that_cannot_be_used_are_errors_that_name_the_url(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder memory://none"):
        of("memory://none")
    for source in ("list", "zip"):
        with pytest.raises(FileNotFoundError, match=r"there is no file memory://x\.csv"):
            of("memory://x.csv", source)
    with pytest.raises(ConfigError, match="cannot open nowhere://x: ValueError"):
        of("nowhere://x")
    with pytest.raises(ConfigError, match=r"no \*\.tar file at memory://s/\*\.tar"):
        of("memory://s/*.tar", "shards")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"needs fsspec .*mocofast\[remote\]"):
        of("s3://bucket/images")
