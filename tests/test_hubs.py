"""Images at `hf://` and `gs://`, by the client libraries and servers on this machine that answer as
the Hugging Face Hub and Google Cloud Storage do.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mocofast.data import download as downloads
from tests.pictures import assert_same_batches, jpeg
from tests.raw_server import ok, serving
from tests.test_remote import of, put_folder, stream, tar_of

fsspec = pytest.importorskip("fsspec")

HUB = "/datasets/me/set"
BUCKET = "/storage/v1/b/photos"


class Store:
    """Files of a storage, {name: content}, and the number of reads of every file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.reads: Counter[str] = Counter()

    def add(self, root: Path, at: str) -> None:
        """Takes the files below a folder."""
        for path in root.rglob("*.*"):
            self.files[f"{at}/{path.relative_to(root).as_posix()}"] = path.read_bytes()

    def content(self, name: str, headers: dict[str, str]) -> list[bytes]:
        """Answers with a file, or the part of it that is asked for."""
        self.reads[name] += 1
        content = self.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        if asked is None:
            return [ok(content)]
        first, last = int(asked[1]), min(int(asked[2]) + 1, len(content))
        place = f"Content-Range: bytes {first}-{last - 1}/{len(content)}"
        return [ok(content[first:last], place).replace(b"200 OK", b"206 Partial Content", 1)]

    def hub(self, line: str, headers: dict[str, str]) -> list[bytes]:
        """Answers as the Hugging Face Hub."""
        path = unquote(urlsplit(line.split()[1]).path)
        if path == f"/api{HUB}":
            return [_json({"id": "me/set", "sha": "1" * 40})]
        if path.startswith(f"/api{HUB}/tree/main"):
            below = f"{path.removeprefix(f'/api{HUB}/tree/main')}/".lstrip("/")
            names = [name for name in self.files if name.startswith(below)]
            folders = {str(part) for name in names for part in Path(name).parents} - {
                ".",
                below[:-1],
            }
            found = [{"type": "directory", "oid": "", "path": name} for name in sorted(folders)]
            found += [_entry(name, self.files[name]) for name in names]
            return [_json(found) if found else _missing("X-Error-Code: EntryNotFound")]
        name = path.removeprefix(f"{HUB}/resolve/main/")
        return self.content(name, headers) if name in self.files else [_missing()]

    def bucket(self, line: str, headers: dict[str, str]) -> list[bytes]:
        """Answers as a bucket `photos` of Google Cloud Storage, without folders."""
        asked = urlsplit(line.split()[1])
        query = {key: values[0] for key, values in parse_qs(asked.query).items()}
        if asked.path == f"{BUCKET}/o":
            names = sorted(n for n in self.files if n.startswith(query.get("prefix", "")))
            folders, items = set[str](), []
            for name in names:
                rest = name.removeprefix(query.get("prefix", ""))
                if (end := query.get("delimiter", "\n")) in rest:
                    folders.add(name.removesuffix(rest) + rest.split(end)[0] + end)
                else:
                    items.append(_object(name, self.files[name]))
            return [_json({"items": items, "prefixes": sorted(folders)})]
        name = unquote(asked.path.removeprefix("/download").removeprefix(f"{BUCKET}/o/"))
        if name not in self.files:
            return [_missing()]
        if asked.path.startswith("/download") or query.get("alt") == "media":
            return self.content(name, headers)
        return [_json(_object(name, self.files[name]))]


def _json(value: Any) -> bytes:
    return ok(json.dumps(value).encode(), "Content-Type: application/json")


def _missing(*headers: str) -> bytes:
    return ok(b"{}", *headers).replace(b"200 OK", b"404 Not Found", 1)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "oid": oid, "size": len(content), "path": name}


def _object(name: str, content: bytes) -> dict[str, Any]:
    tag = hashlib.md5(content).hexdigest()
    times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
    return {"name": name, "bucket": "photos", "size": str(len(content)), "etag": tag, **times}


@pytest.fixture(params=["hf", "gs"])
def at(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns an empty storage and its URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    store = Store()
    yield from (_hub if request.param == "hf" else _bucket)(store, monkeypatch)


def _hub(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    library = pytest.importorskip("huggingface_hub")
    with serving(store.hub) as url:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url, "token": False})
        yield store, f"hf:/{HUB}"
        library.HfFileSystem.clear_instance_cache()


def _bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    # Otherwise gcsfs asks for the kind of the bucket in gRPC.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    library = pytest.importorskip("gcsfs")
    with serving(store.bucket) as url:
        options = {"endpoint_url": url, "token": "anon"}
        for scheme in ("gs", "gcs"):
            monkeypatch.setitem(fsspec.config.conf, scheme, options)
        yield store, "gs://photos"
        library.GCSFileSystem.clear_instance_cache()


def test_a_folder_is_the_folder_it_was_copied_from(at: tuple[Store, str], tmp_path: Path) -> None:
    store, url = at
    put_folder(tmp_path / "set")
    store.add(tmp_path / "set", "set")
    remote, local = of(f"{url}/set"), of(tmp_path / "set")
    assert remote.note == local.note
    assert remote.train.fingerprint() == local.train.fingerprint()
    whole = list(stream(remote.train).epoch(1))
    assert_same_batches(whole, stream(local.train).epoch(1))
    assert_same_batches(whole[1:], stream(remote.train).epoch(1, 1))
    read = {f"set/{remote.train.name(i)}" for i in range(len(remote.train))}
    assert store.reads == dict.fromkeys(read, 1)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        of(f"{url}/none")


def test_shards_and_tables_are_found_by_a_pattern(at: tuple[Store, str]) -> None:
    store, url = at
    for i in range(2):
        store.files[f"s/x-{i}.tar"] = tar_of(range(4 * i, 4 * i + 4))
    train = of(f"{url}/s/x-*.tar", "shards", holdout=0.0).train
    assert [train.load(i) for i in range(8)] == [jpeg(i) for i in range(8)]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [jpeg(i) for i in range(6)], "label": [0, 1] * 3}), buffer)
    store.files["data/train-0.parquet"] = buffer.getvalue()
    fsspec.filesystem(url.partition(":")[0]).invalidate_cache()
    train = of(f"{url}/data/train-*.parquet", "parquet", holdout=0.0).train
    assert train.load(5) == jpeg(5)
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1] * 3
