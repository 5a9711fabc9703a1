"""Tar shards: their content and index, the order of their samples, and downloads."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data import download, shard_index
from mocofast.data.braces import expand_braces
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import BatchSlice, Loader, epoch_order
from mocofast.data.loaders import build_loader, choose_loader, dali_missing
from mocofast.data.shard_index import INDEX, local_index
from mocofast.data.shard_places import find_shards
from mocofast.data.shards import ShardSource, open_shards
from mocofast.data.sources import FolderSource, load_datasets
from tests.pictures import assert_same_batches, jpeg, shard_datasets

CPU = torch.device("cpu")
SMALL = AugmentConfig(size=19, jitter_p=0.8, blur=0.5)
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives every test an own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(
    root: Path, sizes: Sequence[int] = (9, 5, 9), labelled: bool = True, first: int = 0
) -> Path:
    """Writes shards of unequal sizes. Sample i is `jpeg(i)`, of class i % 3."""
    for number, size in enumerate(sizes):
        members = []
        for i in range(first, first + size):
            members.append((f"{i:04}.jpg", jpeg(i % 23)))
            if labelled:
                members.append((f"{i:04}.cls", str(i % 3).encode()))
        write_tar(root / f"set-{number:06}.tar", members)
        first += size
    return root


def source_of(path: Path | str, window: int = 0) -> ShardSource:
    return open_shards(find_shards(str(path)), window)


def folder_of(source: ShardSource, root: Path) -> FolderSource:
    """Writes the samples of `source` as files."""
    root.mkdir()
    names = [source.name(i).replace(":", "-") + ".jpg" for i in range(len(source))]
    for i, name in enumerate(names):
        (root / name).write_bytes(source.load(i))
    return FolderSource(root, names, source.labels, source.classes)


# What a shard holds


def test_samples_are_read_where_they_lie_with_labels_and_names(tmp_path: Path) -> None:
    source = source_of(write_shards(tmp_path))
    assert len(source) == 23
    assert [source.load(i) for i in range(23)] == [jpeg(i) for i in range(23)]
    assert source.labels is not None
    assert source.labels.tolist() == [i % 3 for i in range(23)]
    assert source.classes == ("0", "1", "2")
    assert source.name(9) == "set-000001.tar:0009"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.load(22) == source.load(22)
    part = source.subset(np.array([2, 9, 20]))
    assert [part.load(i) for i in range(3)] == [jpeg(2), jpeg(9), jpeg(20)]
    assert [part.name(i) for i in range(3)] == [source.name(i) for i in (2, 9, 20)]
    assert part.fingerprint() != source.fingerprint()


def test_keys_end_at_the_first_dot_and_other_members_are_left_alone(tmp_path: Path) -> None:
    image = jpeg(0)
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("./a/one.JPG", image),
            ("./a/one.json", b'{"label": 1, "caption": "a.b"}'),
            ("v1.0/two.png", b"png"),  # the dot of a folder belongs to the key
            ("v1.0/two.cls", b"2\n"),
            ("v1.0/two.json", b'{"label": 7}'),  # WebDataset's readers take .cls
            ("three.mask.png", b"a mask"),  # extension mask.png: no image
            ("three.jpeg", image + b"3"),
            ("three.json", b'{"label": "cat"}'),
            ("._three.jpeg", b"a file that macOS adds"),
            ("notes.txt", b"text"),
        ],
    )
    index = local_index(path)
    assert index.keys.tolist() == [b"./a/one", b"v1.0/two", b"three"]
    names = index.members.label_names
    assert [names[i].decode() for i in index.labels] == ["1", "2", "cat"]
    source = source_of(path)
    assert source.classes == ("1", "2", "cat")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]
    assert source.remarks == (
        "members of shards left out: 1 hidden files; 1 member of other kinds (1 .txt)",
        "1 image not used, because another image has the same key: three.jpeg is used, "
        "three.mask.png is not; --data.exclude '*.jpeg' makes the other choice",
    )
    assert [source.load(i) for i in range(3)] == [image, b"png", image + b"3"]


def test_a_broken_or_empty_shard_is_an_error_with_its_name(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "whole", sizes=(3,)) / "set-000000.tar"
    (tmp_path / "text.tar").write_bytes(b"no tar " * 200)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: local_index(whole).offsets[2] + 100])
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(whole)
    for path in (tmp_path / "text.tar", cut, packed):
        with pytest.raises(
            ConfigError, match=rf"{path.name}' is not a whole, uncompressed tar file"
        ):
            source_of(path)
    with pytest.raises(ConfigError, match=r"no image in 1 shards, none\.tar the first"):
        source_of(write_tar(tmp_path / "none.tar", [("a.txt", b"text")]))
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*gone-1\.tar"):
        find_shards(str(tmp_path / "gone-{1..2}.tar"))
    with pytest.raises(
        ConfigError, match=r"no image below .*its \*\.tar are for data\.source=shards"
    ):
        load_datasets(DataConfig(path=str(tmp_path / "whole")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.tar file below .*folder"):
        find_shards(str(tmp_path / "folder"))


def test_an_index_is_made_once_and_again_when_its_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_shards(tmp_path / "set", sizes=(3,)) / "set-000000.tar"
    first = local_index(path)
    assert Path(f"{path}{INDEX}").is_file()

    def fail(path: Path) -> None:
        raise AssertionError(f"scanned {path} again")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "_scan", fail)
        again = local_index(path)
        for old, new in zip(first[:-1], again[:-1]):
            assert np.array_equal(old, new)
        for old, new in zip(first.members, again.members):
            assert np.array_equal(old, new)
    write_tar(path, [("only.jpg", jpeg(1)), ("only.cls", b"1")])
    os.utime(path, ns=(1, 1))  # the clock may be too coarse to show the change
    assert local_index(path).keys.tolist() == [b"only"]
    Path(f"{path}{INDEX}").write_bytes(b"broken")
    assert local_index(path).keys.tolist() == [b"only"]
    # If the place is read-only, the index goes to the cache folder. The test runs as root,
    # who may write anywhere, so a folder takes the name of the index.
    Path(f"{path}{INDEX}").unlink()
    Path(f"{path}{INDEX}").mkdir()
    assert local_index(path).keys.tolist() == [b"only"]
    assert len(list(cache.rglob(f"*{INDEX}"))) == 1
    monkeypatch.setattr(shard_index, "_scan", fail)
    assert local_index(path).keys.tolist() == [b"only"]


def test_an_index_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def fill_the_disk(file: io.BufferedWriter, **columns: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    path = write_shards(tmp_path, sizes=(3,)) / "set-000000.tar"
    monkeypatch.setattr(np, "savez", fill_the_disk)
    assert len(local_index(path).keys) == 3
    assert [*tmp_path.iterdir(), *cache.rglob("*.*")] == [path]


def test_a_shard_that_shrinks_during_a_run_ends_it(tmp_path: Path) -> None:
    source = source_of(write_shards(tmp_path, sizes=(4,)))
    os.truncate(tmp_path / "set-000000.tar", 3000)
    stream = build_loader(
        source, DataConfig(loader="torchvision", workers=0), (SMALL,), BatchSlice(4), 0, CPU
    )
    with pytest.raises(OSError, match="it changed after its index"):
        list(stream.epoch(0))


# Which shards


def test_braces_expand_to_numbers_as_wide_as_the_first_and_to_alternatives() -> None:
    assert expand_braces("x-{098..101}.tar") == ["x-098.tar", "x-099.tar", "x-100.tar", "x-101.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_shards_are_named_by_folder_pattern_and_braces(tmp_path: Path) -> None:
    write_shards(tmp_path)
    everything = [f"set-00000{i}.tar" for i in range(3)]
    for path in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/set-{{000000..000002}}.tar"):
        assert [shard.name for shard in find_shards(path)] == everything
    assert [
        shard.name for shard in find_shards(f"{tmp_path}/set-{{000002,000000}}.tar")
    ] == everything[2::-2]


def test_train_and_val_folders_of_shards_are_the_datasets_and_meta_names_the_classes(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path / "train")
    write_shards(tmp_path / "val", sizes=(6,), first=30)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": ["ant", "bee", "cat"]}))
    train, val, note = shard_datasets(tmp_path)
    assert val is not None
    assert note == "23 images of 3 classes; held out: val/, 6"
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert (train.name(0), val.name(0)) == ("train/set-000000.tar:0000", "val/set-000000.tar:0030")
    write_tar(tmp_path / "val" / "set-000001.tar", [("odd.jpg", jpeg(0)), ("odd.cls", b"3")])
    datasets = load_datasets(DataConfig(source="shards", path=str(tmp_path)))
    assert datasets.note == note
    assert datasets.remarks == ("1 image of val/ not evaluated: no class of the training",)
    write_tar(tmp_path / "train" / "set-000003.tar", [("odd.jpg", jpeg(0)), ("odd.cls", b"3")])
    with pytest.raises(ConfigError, match=r"label 3 .* 3 classes"):
        shard_datasets(tmp_path)


def test_labelled_shards_without_val_hold_a_share_out_and_unlabelled_ones_do_not(
    tmp_path: Path,
) -> None:
    train, val, note = shard_datasets(write_shards(tmp_path / "a"), holdout=0.2)
    assert val is not None
    assert "5 of them held out" in note
    names = [source.name(i) for source in (train, val) for i in range(len(source))]
    assert len(set(names)) == len(names) == 23
    train, val, note = shard_datasets(write_shards(tmp_path / "b", labelled=False))
    assert (train.labels, val, note) == (None, None, "23 images without labels")


def test_the_fingerprint_follows_names_places_and_labels_but_not_the_folder(tmp_path: Path) -> None:
    one = source_of(write_shards(tmp_path / "one")).fingerprint()
    assert source_of(write_shards(tmp_path / "two")).fingerprint() == one
    other = [
        # The order of an epoch depends on the sizes of the shards.
        source_of(write_shards(tmp_path / "moved", sizes=(5, 9, 9))),
        source_of(write_shards(tmp_path / "unlabelled", labelled=False)),
        source_of(write_shards(tmp_path / "renamed", first=1)),
    ]
    assert len({one, *(source.fingerprint() for source in other)}) == 4


# The order


def test_without_a_window_the_order_is_a_folders(tmp_path: Path) -> None:
    assert np.array_equal(source_of(write_shards(tmp_path)).order(3, 1), epoch_order(23, 3, 1))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_window_shuffles_shards_and_samples_within_a_few_of_them(
    tmp_path: Path, held_out: bool
) -> None:
    # The last window holds one shard.
    source = source_of(write_shards(tmp_path, sizes=(4, 1, 6, 3, 5)), window=2)
    if held_out:  # no sample of the second shard
        source = source.subset(np.array([0, 2, 5, 7, 10, 14, 15, 18]))
    shard = np.array([int(source.name(i)[4:10]) for i in range(len(source))])
    orders = [source.order(0, epoch) for epoch in range(20)]
    windows = set()
    for order in orders:
        assert sorted(order) == list(range(len(source)))
        runs = [int(i) for i, before in zip(shard[order], [-1, *shard[order]]) if i != before]
        # A shard does not come again after its window: samples of at most two shards are mixed.
        position = {i: np.flatnonzero(shard[order] == i) for i in set(runs)}
        overlapping = [
            (a, b)
            for a, b in itertools.combinations(sorted(position), 2)
            if position[a][0] < position[b][-1] and position[b][0] < position[a][-1]
        ]
        assert all(sum(i in pair for pair in overlapping) <= 1 for i in position)
        windows |= set(overlapping)
    assert len(windows) >= 3  # other shards are mixed in other epochs
    assert len({order.tobytes() for order in orders}) == 20
    assert np.array_equal(source.order(0, 7), orders[7])
    assert not np.array_equal(source.order(1, 7), orders[7])


# Through the loaders


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("window", [0, 1])
def test_loaders_show_shards_as_files_and_resume_exactly(
    tmp_path: Path, name: str, window: int
) -> None:
    source = source_of(write_shards(tmp_path / "set"), window)
    data = DataConfig(loader=name, workers=1)

    def stream(source: ShardSource | FolderSource) -> Loader:
        return build_loader(source, data, (SMALL, SMALL), BatchSlice(4), 5, CPU)

    loader, files = stream(source), stream(folder_of(source, tmp_path / "files"))
    whole = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    assert len(whole[1]) > 2
    if not window:
        assert_same_batches(whole[1], list(files.epoch(1)))
    order = source.order(5, 1)
    assert torch.cat([batch.index for batch in whole[1]]).tolist() == order[:20].tolist()
    resumed = stream(source)
    assert_same_batches(resumed.epoch(1, 2), whole[1][2:])
    for opened in (loader, files, resumed):
        opened.close()


@pytest.mark.parametrize("name", LOADERS)
def test_a_bad_member_is_skipped_counted_and_named(tmp_path: Path, name: str) -> None:
    images = [jpeg(i) for i in range(8)]
    images[2] = images[2][: len(images[2]) // 2]
    images[5] = b"no image"
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", content) for i, content in enumerate(images)])
    source = source_of(tmp_path)
    loader = build_loader(
        source, DataConfig(loader=name, workers=1), (SMALL, SMALL), BatchSlice(4), 0, CPU
    )
    shown = torch.cat([batch.index for batch in loader.epoch(0)]).tolist()
    loader.close()
    named = {source.name(i): reason for i, reason in loader.skipped.items()}
    assert set(named) == {"a.tar:2", "a.tar:5"}
    assert "truncated" in named["a.tar:2"]
    assert "cannot identify" in named["a.tar:5"]
    assert sorted(shown) == [0, 1, 3, 3, 4, 6, 6, 7]
    batches = EvalBatches(source, 16, 3, 0, CPU)
    assert torch.cat([index for _, _, index in batches]).tolist() == [0, 1, 3, 4, 6, 7]
    assert set(batches.skipped) == {2, 5}


def test_shards_go_to_dali_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mocofast.data.loaders.dali_missing", lambda: "")
    assert choose_loader(source_of(write_shards(tmp_path)), "auto", CPU, (SMALL,))[0] == "dali"


# From a server


class Handler(SimpleHTTPRequestHandler):
    """Serves files with ranges.

    busy: number of first requests for a tar with status 503 as the answer.
    broken: number of later answers with only half of a tar.
    """

    broken = busy = 0
    # The class holds the state of the server. The fixture resets it.
    requests: list[tuple[str, str | None]] = []  # noqa: RUF012
    etag = '"1"'

    def do_GET(self) -> None:
        kind = type(self)
        path = Path(self.translate_path(self.path))
        asked = self.headers["Range"]
        kind.requests.append((path.name, asked))
        if not path.is_file():
            return self.send_error(404)
        if kind.busy and path.suffix == ".tar":
            kind.busy -= 1
            return self.send_error(503)
        content = path.read_bytes()
        start = (
            int(asked[len("bytes=") : -1]) if asked and self.headers["If-Range"] == kind.etag else 0
        )
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", kind.etag)
        self.end_headers()
        body = content[start:]
        if kind.broken and path.suffix == ".tar":
            kind.broken -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Returns a function. The function serves a folder and returns the URL of the folder."""
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    Handler.broken = Handler.busy = 0
    Handler.requests, Handler.etag = [], '"1"'
    servers = []

    def start(root: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked_for(suffix: str) -> list[str]:
    return [name for name, _ in Handler.requests if name.endswith(suffix)]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("indexed", [False, True])
def test_remote_shards_are_the_local_ones_and_each_is_fetched_once(
    tmp_path: Path, serve: Callable[[Path], str], cache: Path, indexed: bool
) -> None:
    local = source_of(write_shards(tmp_path))  # keeps indices beside the shards
    if not indexed:
        for path in tmp_path.glob(f"*{INDEX}"):
            path.unlink()
    url = serve(tmp_path) + "/set-{000000..000002}.tar"
    source = source_of(url, window=1)
    assert (len(asked_for(".tar")) == 0) == indexed  # with indices, no shard is needed yet
    assert source.load(10) == local.load(10)
    if indexed:
        assert asked_for(".tar") == ["set-000001.tar"]
    source.order(0, 0)  # downloads the others
    wait_for(lambda: len(list(cache.rglob("*.tar"))) == 3)
    assert [source.load(i) for i in range(23)] == [local.load(i) for i in range(23)]
    assert source.fingerprint() == local.fingerprint()
    assert source_of(url).load(0) == local.load(0)  # a later run
    assert sorted(asked_for(".tar")) == [f"set-00000{i}.tar" for i in range(3)]


def test_a_broken_transfer_goes_on_where_it_stopped(
    tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    whole = (write_shards(tmp_path / "www", sizes=(9,)) / "set-000000.tar").read_bytes()
    url = serve(tmp_path / "www") + "/set-000000.tar"
    Handler.broken, Handler.busy = 2, 1
    download.download(url, tmp_path / "got.tar")
    assert (tmp_path / "got.tar").read_bytes() == whole
    half, quarter = len(whole) // 2, (len(whole) - len(whole) // 2) // 2
    ranges = [asked for _, asked in Handler.requests]
    assert ranges == [None, None, f"bytes={half}-", f"bytes={half + quarter}-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got.tar", "got.tar.lock", "www"]


def test_content_that_changes_during_a_broken_transfer_is_fetched_anew(
    tmp_path: Path, serve: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path / "www", sizes=(9,)) / "set-000000.tar"
    url = serve(tmp_path / "www") + "/set-000000.tar"
    Handler.broken = 1
    new = bytes(reversed(path.read_bytes()))

    def change(seconds: float) -> None:
        path.write_bytes(new)
        Handler.etag = '"2"'

    monkeypatch.setattr(download.time, "sleep", change)
    download.download(url, tmp_path / "got.tar")
    assert (tmp_path / "got.tar").read_bytes() == new


def test_a_failed_download_is_an_error_with_the_url_and_skips_no_sample(
    tmp_path: Path, serve: Callable[[Path], str], cache: Path
) -> None:
    write_shards(tmp_path / "www")
    url = serve(tmp_path / "www")
    with pytest.raises(ConfigError, match=r"cannot fetch http.*nowhere\.tar: .*404"):
        source_of(f"{url}/nowhere.tar")
    source_of(tmp_path / "www")  # indices
    source = source_of(url + "/set-{000000..000002}.tar")
    (tmp_path / "www" / "set-000001.tar").unlink()
    for name in ("torchvision", "dali"):
        if name == "dali" and dali_missing():
            continue
        loader = build_loader(
            source, DataConfig(loader=name, workers=0), (SMALL,), BatchSlice(23), 0, CPU
        )
        with pytest.raises(OSError, match=r"cannot fetch http.*set-000001\.tar: .*404"):
            next(iter(loader.epoch(0)))
        assert not loader.skipped
        loader.close()
    wait_for(lambda: not list(cache.rglob("*.part")))  # of downloads ahead of use


def test_a_remote_shard_that_does_not_match_its_index_is_refused(
    tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    write_shards(tmp_path, sizes=(3, 3))
    url = serve(tmp_path) + "/set-00000{0,1}.tar"
    source_of(tmp_path)
    source = source_of(url)
    write_tar(tmp_path / "set-000001.tar", [("other.jpg", jpeg(0))])
    assert source.load(0) == jpeg(0)
    with pytest.raises(OSError, match=r"has \d+ bytes, its index says"):
        source.load(3)


def test_threads_that_want_one_file_fetch_it_once(
    tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    write_shards(tmp_path / "www", sizes=(3,))
    url = serve(tmp_path / "www") + "/set-000000.tar"
    threads = [
        threading.Thread(target=download.download, args=(url, tmp_path / "x.tar")) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Handler.requests) == 1
    assert Image.open(io.BytesIO(source_of(tmp_path / "x.tar").load(0))).size == (90, 30)
