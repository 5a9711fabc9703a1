"""HTTP servers with wrong, short, slow or endless answers: nothing wrong stays in the cache."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path

import pytest

from mocofast.config import ConfigError, DataConfig
from mocofast.data import download as downloads
from mocofast.data.download import InvalidContent, download
from mocofast.data.remote import RemoteSource, local_copy
from mocofast.data.shard_index import INDEX, local_index
from mocofast.data.shard_places import find_shards
from mocofast.data.shards import ShardSource, open_shards
from mocofast.data.sources import load_datasets
from mocofast.data.tar_members import check_tar
from tests.pictures import jpeg
from tests.raw_server import ok, serving

LOGIN = b"<!-- page -->\n  <!DOCTYPE html><html><body>Please log in</body></html>" + b" " * 4000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    return tmp_path / "cache"


def shard_of(*seeds: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for seed in seeds:
            info = tarfile.TarInfo(f"{seed}.jpg")
            info.size = len(jpeg(seed))
            tar.addfile(info, io.BytesIO(jpeg(seed)))
    return buffer.getvalue()


def kept(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]


def opened(url: str) -> ShardSource:
    return open_shards(find_shards(url))


@pytest.mark.parametrize(
    "body", [LOGIN, b"", b"not found", shard_of(1, 2)[:-10240], shard_of(1, 2)[:700]]
)
@pytest.mark.parametrize("length", [True, False])
def test_what_is_no_whole_shard_is_refused_and_fetched_again(
    cache: Path, body: bytes, length: bool
) -> None:
    answers = [ok(body, length=length)] * 2 + [ok(shard_of(1, 2))] * 9

    def answer(line: str, headers: dict[str, str]) -> list[bytes]:
        if INDEX in line:
            return [ok(LOGIN)]  # a page in place of the index
        return [answers.pop(0)]

    with serving(answer) as url:
        with pytest.raises(ConfigError, match=r"cannot fetch .*/x\.tar: .* is (no|a) "):
            opened(f"{url}/x.tar")
        assert not kept(cache)
        assert opened(f"{url}/x.tar").load(1) == jpeg(2)
        answers.insert(0, ok(body, length=length))  # a single wrong answer
        assert opened(f"{url}/y.tar").load(1) == jpeg(2)


def test_a_copy_that_is_damaged_in_the_cache_is_fetched_again(cache: Path) -> None:
    whole = shard_of(1, 2, 3)
    with serving(lambda line, headers: [ok(b"x" if INDEX in line else whole)]) as url:
        source = opened(f"{url}/x.tar")
        (path,) = cache.rglob("x.tar")
        path.write_bytes(whole[:2000])  # another size than in the index
        assert source.load(2) == jpeg(3)
        damaged = bytearray(whole)
        damaged[whole.index(b"2.jpg") + 60] ^= 1
        path.write_bytes(damaged)
        for index in cache.rglob(f"*{INDEX}"):
            index.unlink()
        assert opened(f"{url}/x.tar").load(2) == jpeg(3)


def test_a_shard_that_changed_on_the_server_is_fetched_again(tmp_path: Path) -> None:
    contents, tag, asked = {"a": shard_of(1, 2), "b": shard_of(3, 4)}, ["a"], []
    indices = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        local_index(tmp_path / f"{name}.tar")
        indices[name] = (tmp_path / f"{name}.tar{INDEX}").read_bytes()

    def answer(line: str, headers: dict[str, str]) -> list[bytes]:
        asked.append(line.split()[0])
        content = (indices if INDEX in line else contents)[tag[0]]
        head = ok(content, f'ETag: "{tag[0]}"')
        return [head.removesuffix(content) if line.startswith("HEAD") else head]

    with serving(answer) as url:
        assert opened(f"{url}/x.tar").load(0) == jpeg(1)
        asked.clear()
        assert opened(f"{url}/x.tar").load(0) == jpeg(1)
        assert asked == ["HEAD"]
        tag[0] = "b"
        assert opened(f"{url}/x.tar").load(0) == jpeg(3)
    assert opened(f"{url}/x.tar").load(0) == jpeg(3)  # without a network


@pytest.mark.parametrize(
    "header",
    ["Content-Length: abc", "Content-Length: -5", "Content-Length: " + "9" * 5000, "X: y"],
)
def test_a_length_that_is_no_number_is_no_length(tmp_path: Path, header: str) -> None:
    whole = shard_of(1, 2)
    with serving(lambda line, headers: [ok(whole, header, length=False)]) as url:
        download(f"{url}/x.tar", tmp_path / "x.tar", check_tar)
    assert (tmp_path / "x.tar").read_bytes() == whole


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nothing of HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_answers_that_are_wrong_are_errors_that_name_the_url(
    tmp_path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    with serving(lambda line, headers: [answer]) as url:
        with pytest.raises(OSError, match=r"http://127|HTTP Error"):
            download(f"{url}/x.jpg", tmp_path / "x.jpg")
        with pytest.raises(OSError, match="http://127"):
            local_copy(f"{url}/x.zip")
    assert not kept(tmp_path)


def test_another_part_than_the_one_asked_for_is_fetched_anew(tmp_path: Path) -> None:
    whole, asked = shard_of(1, 2), []

    def answer(line: str, headers: dict[str, str]) -> list[bytes]:
        asked.append(headers.get("range"))
        if len(asked) == 1:
            return [ok(whole, 'ETag: "1"')[:2000]]
        if len(asked) == 2:
            wrong = ok(whole[5:], "Content-Range: bytes 5-9/9")
            return [wrong.replace(b"200 OK", b"206 Partial Content")]
        return [ok(whole)]

    with serving(answer) as url:
        download(f"{url}/x.tar", tmp_path / "x.tar", check_tar)
    assert (tmp_path / "x.tar").read_bytes() == whole
    assert asked[0] is None
    assert asked[1] is not None
    assert asked[2] is None


def test_slow_and_endless_answers_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    for pieces in (
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 1000],
        [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 90],
    ):
        begin = time.monotonic()
        with (
            serving(lambda line, headers, pieces=pieces: pieces, 0.05) as url,
            pytest.raises(OSError, match=r"slower than 10,000 bytes a second|no answer within"),
        ):
            download(f"{url}/x.jpg", tmp_path / "x.jpg")
        assert time.monotonic() - begin < 5
    endless = [b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(1 << 16)] * 100]
    with (
        serving(lambda line, headers: endless) as url,
        pytest.raises(OSError, match=r"more than 1,000,000 bytes"),
    ):
        download(f"{url}/x.jpg", tmp_path / "x.jpg", largest=10**6)
    assert not kept(tmp_path)


def test_a_page_or_a_part_of_an_image_is_skipped_and_fetched_again(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = [ok(LOGIN)] * 2 + [ok(jpeg(3)[:-200], length=False)] * 2

    def answer(line: str, headers: dict[str, str]) -> list[bytes]:
        return [wrong.pop(0) if wrong else ok(jpeg(3), length=False)]

    with serving(answer) as url:
        source = RemoteSource(url, ["a.jpg"])
        assert not Path(source.load(0)).exists()
        assert not Path(source.load(0)).exists()
        assert "a page of HTML, such as a login" in caplog.text
        assert "no whole image (OSError: image file is truncated" in caplog.text
        assert Path(source.load(0)).read_bytes() == jpeg(3)


@pytest.mark.parametrize("name", ["set.zip", "set.parquet", "set.csv"])
def test_pages_are_no_archives_lists_or_tables(cache: Path, name: str) -> None:
    source = {".zip": "zip", ".parquet": "parquet", ".csv": "list"}[Path(name).suffix]
    for body in (LOGIN, b"PAR1 cut off"):
        if name == "set.csv" and body is not LOGIN:
            continue
        with (
            serving(lambda line, headers, body=body: [ok(body)]) as url,
            pytest.raises(OSError, match=r"cannot fetch .* is (a page|no )"),
        ):
            load_datasets(DataConfig(source=source, path=f"{url}/{name}"))
        assert not kept(cache)


def test_invalid_content_is_an_oserror_that_says_what_it_is(tmp_path: Path) -> None:
    with serving(lambda line, headers: [ok(LOGIN)]) as url, pytest.raises(InvalidContent) as caught:
        download(f"{url}/x.jpg", tmp_path / "x.jpg")
    assert str(caught.value) == f"{url}/x.jpg is a page of HTML, such as a login"
