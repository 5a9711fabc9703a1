"""Tar shards in WebDataset's layout as a set of images that is read in any order.

A sample is the members of one name up to the first dot of their last part: `key.jpg` (or another image extension)
and, for its label, `key.cls` (an integer as text) or `key.json` with an integer `label`. Others are left alone.

Each shard is scanned once, header by header, into an index (key, offset, size and label of every sample), kept
beside it as `NAME.tar.index.npz`, or in the cache folder where that place is read-only, and made anew when the
shard's size or time of modification changes. Samples are then read where they lie, so a batch stays a function of
(seed, epoch, step, rank) alone.

Shards at `http(s)://` are downloaded whole into the cache folder, once, when their first sample is wanted; their
indices are fetched first where the server has them (`mocofast prepare` writes them), else made from the shards.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
import os
import re
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

import numpy as np

from mocofast import files
from mocofast.config import ConfigError
from mocofast.data.download import cache_folder, download
from mocofast.data.interface import epoch_order
from mocofast.data.names import EXTENSIONS, checked_labels, digest, find_files

log = logging.getLogger(__name__)

INDEX = ".index.npz"  # appended to a shard's name
INDEX_VERSION = 1
META = "meta.json"  # in the folder of shards; its "classes" names the labels
AT_ONCE = 8  # shards indexed side by side: on a network disk each header is a wait


@dataclass(frozen=True)
class TarShard:
    """One tar file."""

    name: (
        str  # for logs and the fingerprint: its path below the folder, or the last part of its path
    )
    path: Path  # where its bytes are, or will be
    url: str = ""  # where to fetch it; "" for a local one


class Index(NamedTuple):
    """What lies where in one shard: n samples."""

    shard_size: int  # of the whole file, in bytes
    keys: np.ndarray  # (n,) bytes
    offsets: np.ndarray  # (n,) int64, in bytes
    sizes: np.ndarray  # (n,) int64, in bytes
    labels: np.ndarray  # (n,) int64; -1 for none


class ShardSource:
    """Samples of tar shards; `load` gives the bytes of an image file."""

    def __init__(
        self,
        shards: Sequence[TarShard],
        indices: Sequence[Index],
        classes: tuple[str, ...],
        window: int = 0,
    ) -> None:
        """classes: names of the labels, () for unlabelled; window: see `order`."""
        self._shards, self._window = tuple(shards), window
        self._shard_sizes = tuple(index.shard_size for index in indices)
        counts = [len(index.keys) for index in indices]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # a sample's shard
        self._keys, self._offsets, self._sizes, labels = (
            np.concatenate([index[field] for index in indices]) for field in range(1, 5)
        )
        self.classes = classes
        self.labels = checked_labels(labels if classes else None, len(self), classes)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        """shard.tar:key"""
        return f"{self._shards[self._shard[index]].name}:{os.fsdecode(self._keys[index])}"

    def load(self, index: int) -> bytes:
        """The image file. Raises OSError where the shard cannot be read or fetched, or has become shorter."""
        number = self._shard[index]
        shard, size = self._shards[number], int(self._sizes[index])
        self._fetch(number)
        with shard.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, int(self._offsets[index]))
        if len(content) < size:
            raise OSError(
                f"{shard.path} ends within {os.fsdecode(self._keys[index])}: it changed after its index"
            )
        return content

    def subset(self, index: np.ndarray) -> ShardSource:
        """These of its samples; index: (n,) int64, ascending."""
        part = copy.copy(self)
        part._shard, part._keys, part._offsets, part._sizes = (
            column[index] for column in (self._shard, self._keys, self._offsets, self._sizes)
        )
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of an epoch, (N,) int64: a permutation of all samples, or, with a window of W shards, of the
        shards, and then of the samples within W shards at a time, so that few shards are in use at once.

        Remote shards that are not here yet are downloaded from now on, in the order of their use.
        """
        if not self._window:
            order = epoch_order(len(self), seed, epoch)
            use = np.arange(len(self._shards))
        else:
            rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            use = rng.permutation(len(self._shards))
            bounds = np.searchsorted(self._shard, np.arange(len(use) + 1))
            windows = [
                use[start : start + self._window] for start in range(0, len(use), self._window)
            ]
            parts = [
                np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in window])
                for window in windows
            ]
            order = np.concatenate([rng.permutation(part) for part in parts])
        missing = [int(i) for i in use if self._shards[i].url and not self._shards[i].path.exists()]
        if missing:
            if not self._window:
                log.info(
                    "batches draw on all %d shards, so all are needed first (see data.shuffle_window)",
                    len(use),
                )
            threading.Thread(target=self._fetch_ahead, args=(missing,), daemon=True).start()
        return order

    def fingerprint(self) -> str:
        """Hash of the shards' and samples' names, and labels: the shards may move, their contents may not change."""
        shards = "\0".join(shard.name for shard in self._shards).encode(errors="surrogateescape")
        return digest(
            shards + b"\0" + self._shard.tobytes() + b"\0".join(self._keys.tolist()),
            self.labels,
            self.classes,
        )

    def _fetch(self, number: int) -> None:
        shard = self._shards[number]
        if not shard.url or shard.path.exists():
            return
        begin = time.monotonic()
        try:
            fetched = download(shard.url, shard.path)
        except OSError as error:
            raise OSError(f"cannot fetch {shard.url}: {error}") from error
        found, expected = shard.path.stat().st_size, self._shard_sizes[number]
        if found != expected:
            shard.path.unlink()
            raise OSError(
                f"{shard.url} has {found} bytes, its index says {expected}; delete {shard.path}{INDEX}"
            )
        if fetched:  # and not waited for, while another did
            log.info(
                "%s is here: %.0f MB after %.0f s",
                shard.name,
                found / 1e6,
                time.monotonic() - begin,
            )

    def _fetch_ahead(self, numbers: list[int]) -> None:
        try:
            for number in numbers:
                self._fetch(number)
        except OSError as error:  # whoever needs the shard tries again, and raises
            log.warning("downloading ahead ended: %s", error)


def is_url(path: str) -> bool:
    """http:// or https://"""
    return path.startswith(("http://", "https://"))


def find_shards(path: str, part: str = "") -> list[TarShard]:
    """The shards that data.path means: all *.tar below a folder (below its `part`); or a file, a glob pattern, a URL,
    with braces expanded: x-{000..012}.tar, {a,b}.tar. Raises ConfigError or FileNotFoundError for none."""
    if is_url(path):
        return [_remote(url) for url in expand_braces(path)]
    root = Path(path).expanduser()
    if root.is_dir():
        names = [part + name for name in find_files(root / part, {".tar"})]
        if not names:
            raise ConfigError(f"data.path: no *.tar file below {str(root / part)!r}")
        return [TarShard(name, root / name) for name in names]
    found = [
        Path(match)
        for pattern in expand_braces(str(root))
        for match in sorted(glob.glob(pattern)) or [pattern]
    ]
    for missing in (file for file in found if not file.is_file()):
        raise FileNotFoundError(f"data.path: there is no shard {str(missing)!r}")
    return [TarShard(file.name, file) for file in found]


def expand_braces(pattern: str) -> list[str]:
    """x{08..10}-{a,b} -> x08-a, x08-b, x09-a, ...: numbers as wide as the first, or alternatives."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    options = match[1].split(",")
    if numbers is not None:
        options = [f"{i:0{len(numbers[1])}}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + end for option in options for end in rest]


def _remote(url: str) -> TarShard:
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    place = hashlib.blake2b(f"{parts.netloc}{folder}".encode(), digest_size=8).hexdigest()
    return TarShard(name, cache_folder() / "shards" / place / name, url)


def open_shards(
    shards: Sequence[TarShard], window: int = 0, classes: tuple[str, ...] = ()
) -> ShardSource:
    """A source of all samples of these shards, in their order.

    classes: names of the labels; if none, those in META beside the first shard or in the folder above it, else
    numbers. Unlabelled unless every sample has a label, and two classes occur. Raises ConfigError, OSError.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        indices = list(pool.map(_index, shards))
    labels = np.concatenate([index.labels for index in indices])
    if not len(labels):
        raise ConfigError(
            f"data.path: no image in {len(shards)} shards, {shards[0].name} the first"
        )
    if labels.min() < 0 or labels.min() == labels.max():
        return ShardSource(shards, indices, (), window)
    largest = int(labels.max())
    classes = classes or _class_names(shards[0]) or tuple(str(i) for i in range(largest + 1))
    if largest >= len(classes):
        raise ConfigError(
            f"data.path: label {largest} in {shards[0].name} and on, but there are {len(classes)} classes"
        )
    return ShardSource(shards, indices, classes, window)


def _class_names(shard: TarShard) -> tuple[str, ...]:
    for folder in (shard.path.parent, shard.path.parent.parent):
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            return tuple(str(name) for name in meta["classes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


def _index(shard: TarShard) -> Index:
    if shard.url:
        beside = Path(f"{shard.path}{INDEX}")
        try:
            parts = urlsplit(shard.url)
            download(parts._replace(path=parts.path + INDEX).geturl(), beside)
            return _read(beside, None)
        except (
            HTTPError,
            ValueError,
            KeyError,
            zipfile.BadZipFile,
        ):  # the server has none that can be used
            beside.unlink(missing_ok=True)
        try:
            download(shard.url, shard.path)
        except OSError as error:
            raise ConfigError(f"data.path: cannot fetch {shard.url}: {error}") from error
    return local_index(shard.path)


def local_index(path: Path) -> Index:
    """The index of a tar file, from where it is kept or made now and kept. Raises ConfigError for a broken one."""
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    hashed = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    places = (Path(f"{path}{INDEX}"), cache_folder() / "indices" / f"{hashed}{INDEX}")
    for place in places:
        try:
            return _read(place, stamp)
        except (
            OSError,
            ValueError,
            KeyError,
            zipfile.BadZipFile,
        ):  # none, another shard's, or broken
            continue
    log.info("indexing %s", path)
    index = Index(stat.st_size, *_scanned(path))
    for place in places:
        try:
            _write(place, stamp, index)
            break
        except OSError:  # a read-only place
            continue
    return index


def _read(place: Path, stamp: np.ndarray | None) -> Index:
    with np.load(place, allow_pickle=False) as kept:
        found = kept["stamp"]
        if found[0] != INDEX_VERSION or (stamp is not None and not np.array_equal(found, stamp)):
            raise ValueError("an index of another version or file")
        return Index(int(found[1]), *(kept[field] for field in Index._fields[1:]))


def _write(place: Path, stamp: np.ndarray, index: Index) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Ranks and threads may index one shard at the same time.
    with (
        files.atomic_write(place, f"{os.getpid()}.{threading.get_ident()}") as part,
        part.open("wb") as file,
    ):
        np.savez(
            file,
            stamp=stamp,
            keys=index.keys,
            offsets=index.offsets,
            sizes=index.sizes,
            labels=index.labels,
        )


def _scanned(path: Path) -> tuple[np.ndarray, ...]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, re.DOTALL)
                if match is None or not member.isreg():
                    continue
                key, extension = match[1], match[2].lower()
                if f".{extension}" in EXTENSIONS:
                    images.setdefault(key, (member.offset_data, member.size))
                elif extension in ("cls", "json"):
                    content = tar.extractfile(member)
                    label = _label(extension, content.read() if content else b"")
                    if label >= 0 and (extension == "cls" or key not in labels):
                        labels[key] = label
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(
            f"data.path: {str(path)!r} is not a whole, uncompressed tar file: {error}"
        ) from error
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    keys = np.array([os.fsencode(key) for key in images], dtype=np.bytes_)
    return (
        keys,
        places[:, 0],
        places[:, 1],
        np.array([labels.get(key, -1) for key in images], dtype=np.int64),
    )


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # else a shard of a million samples keeps a gigabyte of headers


def _label(extension: str, content: bytes) -> int:
    """The label, or -1 where there is none."""
    try:
        value = int(content) if extension == "cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return -1
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
