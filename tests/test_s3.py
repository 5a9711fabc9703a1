"""Images at `s3://`, by the client library s3fs and a server of S3's protocol on this machine."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from mocofast import cli
from mocofast.data import download as downloads
from tests.pictures import assert_same_batches, jpeg
from tests.runs import assert_same_run
from tests.test_remote import of, put_folder, stream, tar_of

s3fs = pytest.importorskip("s3fs")


class Bucket(ThreadingHTTPServer):
    """A bucket named `photos`: listings, and files whole or in parts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.reads: Counter[str] = Counter()  # of contents
        self.refused = False
        self.stalled = threading.Event()  # reads wait for `released`
        self.released = threading.Event()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, format: str, *values: object) -> None: ...

    def do_HEAD(self) -> None:
        self._file(only_head=True)

    def do_GET(self) -> None:
        if urlsplit(self.path).query:
            self._list()
        else:
            self._file()

    def _list(self) -> None:
        """ListObjectsV2, all keys in one answer."""
        asked = parse_qs(urlsplit(self.path).query)
        prefix, delimiter = (asked.get(name, [""])[0] for name in ("prefix", "delimiter"))
        rows, folders = [], set()
        for key, content in sorted(self.server.files.items()):
            inner = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in inner:
                folders.add(prefix + inner.split(delimiter)[0] + delimiter)
                continue
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size>"
                f"<ETag>&quot;{_tag(content)}&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        rows += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        self._answer(
            200,
            f'<ListBucketResult xmlns="{space}"><Name>photos</Name><IsTruncated>false'
            f"</IsTruncated>{''.join(rows)}</ListBucketResult>".encode(),
        )

    def _file(self, only_head: bool = False) -> None:
        _, bucket, key = (*unquote(urlsplit(self.path).path).split("/", 2), "")[:3]
        content = self.server.files.get(key) if bucket == "photos" else None
        if self.server.refused:
            code = "AccessDenied"
            self._answer(403, b"" if only_head else f"<Error><Code>{code}</Code></Error>".encode())
        elif content is None:
            self._answer(404, b"" if only_head else b"<Error><Code>NoSuchKey</Code></Error>")
        elif only_head:
            self._answer(200, content, {"ETag": f'"{_tag(content)}"'}, only_head)
        else:
            if self.server.stalled.is_set():
                self.server.released.wait(30)
            self.server.reads[key] += 1
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = found.groups() if found else ("0", "")
            end = min(len(content), int(last) + 1) if last else len(content)
            place = f"bytes {first}-{end - 1}/{len(content)}"
            headers = {"ETag": f'"{_tag(content)}"', "Content-Range": place}
            self._answer(206 if found else 200, content[int(first) : end], headers)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, head: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)


def _tag(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket that s3fs reaches."""
    server = Bucket()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    server.released.set()
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def upload(bucket: Bucket, root: Path, at: str) -> None:
    for path in root.rglob("*.*"):
        bucket.files[f"{at}/{path.relative_to(root).as_posix()}"] = path.read_bytes()


def test_a_folder_is_the_folder_it_was_copied_from_in_workers_too(
    tmp_path: Path, bucket: Bucket
) -> None:
    put_folder(tmp_path / "set")
    upload(bucket, tmp_path / "set", "set")
    remote, local = of("s3://photos/set"), of(tmp_path / "set")
    assert remote.note == local.note
    assert remote.train.fingerprint() == local.train.fingerprint()
    whole = list(stream(remote.train, workers=2).epoch(1))
    assert_same_batches(whole, stream(local.train).epoch(1))
    assert_same_batches(whole[1:], stream(remote.train).epoch(1, 1))
    read = {f"set/{remote.train.name(i)}" for i in range(len(remote.train))}
    assert bucket.reads == dict.fromkeys(read, 1)  # each once, by the processes together


def test_a_run_on_shards_resumes_exactly_and_reads_every_shard_once(
    tmp_path: Path, bucket: Bucket
) -> None:
    for i in range(3):
        bucket.files[f"s/x-{i}.tar"] = tar_of(range(4 * i, 4 * i + 4))
    options = [
        "pretrain",
        "digits",
        "--data.source",
        "shards",
        "--data.path",
        "s3://photos/s/x-*.tar",
        "--data.workers",
        "0",
        "--data.batch_size",
        "4",
        "--model.queue_size",
        "8",
        "--model.arch",
        "resnet_tiny",
        "--augment.size",
        "16",
        "--data.loader",
        "torchvision",
        "--train.log_every",
        "1",
        "--knn.start",
        "false",
        "--train.epochs",
        "2",
    ]
    for out, steps in (("whole", "0"), ("parts", "3"), ("parts", "0")):
        more = ["--train.dir", str(tmp_path / out), "--train.max_steps", steps, "--resume", "auto"]
        assert cli.main([*options, *more]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert bucket.reads == {f"s/x-{i}.tar": 1 for i in range(3)}


def test_a_server_that_refuses_or_hangs_is_an_error_that_names_the_url(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.files = {f"set/a/{i}.jpg": jpeg(i) for i in range(4)}
    train = of("s3://photos/set", labels="none").train
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    bucket.stalled.set()
    with pytest.raises(OSError, match=r"cannot fetch s3://photos/set/a/0\.jpg: .*no answer within"):
        train.load(0)
    bucket.stalled.clear()
    bucket.released.set()
    assert Path(str(train.load(0))).read_bytes() == jpeg(0)
    bucket.refused = True
    monkeypatch.setattr(downloads, "TIMEOUT", 20.0)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=r"cannot fetch s3://photos/set/a/1\.jpg: .*(Denied|Forbid)"):
        train.load(1)
