"""Tar shards in WebDataset's layout, as a source of images that can be read in any order.

`mocofast.data.shard_samples` tells which member is the image of a sample, and the label.

`mocofast.data.shard_index` finds the place of every sample, so samples are read
directly and a batch is a function of (seed, epoch, step, rank) alone.

Shards at `http(s)://` are downloaded completely into the cache folder, once, when their
first sample is needed. Their indices are downloaded first if the server has indices
(`mocofast prepare` writes them). Otherwise the shards are downloaded at the start to
make the indices.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.download import NotStored, cache_folder, download, is_http, is_url
from mocofast.data.finding import ALL, Disk, Patterns, listed
from mocofast.data.interface import epoch_order
from mocofast.data.names import EXTENSIONS, checked_labels, digest
from mocofast.data.remote import joined, matching, names_below
from mocofast.data.shard_index import (
    INDEX,
    UNREADABLE,
    Index,
    index_name,
    index_of,
    local_index,
    read_index,
)
from mocofast.data.shard_samples import NoImageError, Numbering, left_out_lines, number_labels

log = logging.getLogger(__name__)

META = "meta.json"  # in the folder of shards. The entry "classes" names the labels
PACKED = (".gz", ".tgz", ".zip", ".zst")
AT_ONCE = 8  # shards indexed in parallel: on a network disk every header is a wait


@dataclass(frozen=True)
class TarShard:
    """One tar file."""

    name: (
        str  # for logs and the fingerprint: the path below the folder, or the last part of the path
    )
    path: Path  # the local file, which may not be downloaded yet
    url: str = ""  # "" for a local shard


class ShardSource:
    """Samples of tar shards. `load` returns the content of an image file."""

    remarks: tuple[str, ...] = ()  # lines that say what was left out
    photos = True  # False for samples of FIELDS

    def __init__(
        self,
        shards: Sequence[TarShard],
        indices: Sequence[Index],
        numbering: Numbering,
        window: int = 0,
    ) -> None:
        """shards, indices: the shards, and the index of every shard.
        numbering: of the labels. Samples with other labels are unlabelled.
        window: number of shards that are shuffled together, see `order`. 0 for all.
        """
        self._shards, self._window = tuple(shards), window
        self._shard_sizes = tuple(index.shard_size for index in indices)
        counts = [len(index.keys) for index in indices]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # (N,)
        self._keys = np.concatenate([index.keys for index in indices])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self.numbering, self.classes = numbering, numbering.classes
        labels = [_numbers(index, numbering) for index in indices] if self.classes else None
        labels = None if labels is None else np.concatenate(labels)
        self.labels = checked_labels(labels, len(self), self.classes)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        """Returns the sample's name, shard.tar:key."""
        return f"{self._shards[self._shard[index]].name}:{os.fsdecode(self._keys[index])}"

    def load(self, index: int) -> bytes:
        """Returns the content of the image file.

        Raises OSError if the shard cannot be read or downloaded, or has become shorter.
        """
        number = self._shard[index]
        shard, size = self._shards[number], int(self._sizes[index])
        self._fetch(number)
        with shard.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, int(self._offsets[index]))
        if len(content) < size:
            raise OSError(
                f"{shard.path} ends within {os.fsdecode(self._keys[index])}: "
                "it changed after its index"
            )
        return content

    def subset(self, index: np.ndarray) -> ShardSource:
        """Returns a source of some samples, with the same windows. index: (n,) int64,
        ascending.
        """
        part = copy.copy(self)
        part._shard, part._keys, part._offsets, part._sizes = (
            column[index] for column in (self._shard, self._keys, self._offsets, self._sizes)
        )
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the order of an epoch, (N,) int64, and starts to download missing
        remote shards.

        Without a window: a permutation of all samples.
        With a window of W shards: a permutation of the shards, then permutations of the
        samples of W shards at a time, so that few shards are in use at the same time.

        Shards are downloaded in the order of their use.
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
                    "batches mix samples of all %d shards, so all are downloaded first "
                    "(see data.shuffle_window)",
                    len(use),
                )
            threading.Thread(target=self._fetch_ahead, args=(missing,), daemon=True).start()
        return order

    def fingerprint(self) -> str:
        """Returns a hash of the names of shards and samples, and of the labels.

        The shards may move, their content may not change.
        """
        shards = "\0".join(shard.name for shard in self._shards).encode(errors="surrogateescape")
        return digest(
            shards + b"\0" + self._shard.tobytes() + b"\0".join(self._keys.tolist()),
            self.labels,
            self.classes,
        )

    def _fetch(self, number: int) -> None:
        """Downloads a shard if it is remote and missing. Raises OSError if this fails."""
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
                f"{shard.url} has {found} bytes, its index says {expected}; "
                f"delete {shard.path}{INDEX}"
            )
        if fetched:  # by this call, not by another thread or process
            log.info(
                "downloaded %s: %.0f MB in %.0f s",
                shard.name,
                found / 1e6,
                time.monotonic() - begin,
            )

    def _fetch_ahead(self, numbers: list[int]) -> None:
        try:
            for number in numbers:
                self._fetch(number)
        except OSError as error:  # `load` tries again, and raises
            log.warning("downloading ahead ended: %s", error)


def find_shards(path: str, folder: str = "") -> list[TarShard]:
    """Returns the shards of `data.path`.

    path: a folder with *.tar files at any depth, or a file, a glob pattern or a URL.
        Braces in files, patterns and URLs are expanded: x-{000..012}.tar, {a,b}.tar.
    folder: a subfolder of the folder, for example "train/", or a file or pattern in
        the folder.

    Raises ConfigError or FileNotFoundError if there is no shard.
    """
    if is_url(path):
        return _stored(path, folder)
    root = Path(path).expanduser()
    if (root / folder).is_dir():
        found = Disk(root, {".tar"}).find(folder)
        if not found.names:
            packed = {kind: found.kinds[kind] for kind in PACKED if found.kinds[kind]}
            raise ConfigError(
                f"data.path: no *.tar file below {str(root / folder)!r}"
                + (f" ({listed(Counter(packed))}: gunzip unpacks .tar.gz)" if packed else "")
            )
        return [TarShard(name, root / name) for name in found.names]
    pattern = str(root / folder) if folder else str(root)
    files = [
        Path(match)
        for part in expand_braces(pattern)
        for match in sorted(glob.glob(part)) or [part]
    ]
    for missing in (file for file in files if not file.is_file()):
        raise FileNotFoundError(f"data.path: there is no shard {str(missing)!r}")
    return [TarShard(file.name, file) for file in files]


def packed_shards(path: str, folder: str = "") -> list[str]:
    """Returns a line about packed shards in a folder, or none. path, folder: see `find_shards`."""
    root = Path(path).expanduser() / folder
    kinds = Disk(root, {".tar"}).find("").kinds if not is_url(path) and root.is_dir() else {}
    packed = Counter({kind: kinds[kind] for kind in PACKED if kinds.get(kind)})
    return [f"packed shards are left out: {listed(packed)}; gunzip unpacks .tar.gz"] * bool(packed)


def expand_braces(pattern: str) -> list[str]:
    """Expands braces: x{08..10}-{a,b} gives x08-a, x08-b, x09-a, ...

    Numbers are as wide as the first number.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    options = match[1].split(",")
    if numbers is not None:
        options = [f"{i:0{len(numbers[1])}}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + end for option in options for end in rest]


def _stored(path: str, folder: str) -> list[TarShard]:
    """Returns the shards of a URL. path, folder: see `find_shards`."""
    if is_http(path):
        return _remote(expand_braces(path))
    parts = expand_braces(joined(path, folder) if folder else path)
    urls = [url for part in parts for url in matching(part)]
    names: list[str] | None = None
    if urls == parts and len(urls) == 1 and not urls[0].endswith(".tar"):
        names = [name for name in names_below(parts[0]) if name.endswith(".tar")]
        urls = [joined(parts[0], name) for name in names]
        names = [f"{folder}{name}" for name in names]
    if not urls:
        raise ConfigError(f"data.path: no *.tar file at {path}")
    return _remote(urls, names)


def _remote(urls: Sequence[str], names: Sequence[str] | None = None) -> list[TarShard]:
    """Returns the shards at URLs, with places in the cache folder.

    names: of the shards. None takes the last part of the URLs.

    Where URLs differ in the query only, the parameters that differ are a part of the name.
    Other queries are not: signatures change from day to day.
    """
    queries: dict[str, list[dict[str, str]]] = {}
    for url in urls:
        parts = urlsplit(url)
        queries.setdefault(f"{parts.netloc}{parts.path}", []).append(dict(parse_qsl(parts.query)))
    shards = []
    for number, url in enumerate(urls):
        parts = urlsplit(url)
        folder, _, name = parts.path.rpartition("/")
        place = f"{parts.netloc}{folder}"
        others = queries[f"{parts.netloc}{parts.path}"]
        own = dict(parse_qsl(parts.query))
        differ = {k: v for k, v in own.items() if any(other.get(k) != v for other in others)}
        if differ:
            name = f"{name}?{urlencode(sorted(differ.items()))}"
        hashed = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
        file = name.replace("/", "_")
        name = name if names is None else names[number]
        shards.append(TarShard(name, cache_folder() / "shards" / hashed / file, url))
    return shards


def open_shards(
    shards: Sequence[TarShard],
    window: int = 0,
    numbering: Numbering | None = None,
    patterns: Patterns = ALL,
    extensions: Set[str] = EXTENSIONS,
) -> ShardSource:
    """Returns a source of all samples of `shards`, in the order of the shards.

    window: see `ShardSource.order`.
    numbering: of the labels. If None, the names come from META beside the first
        shard or in the folder above, or are the labels (`number_labels`).
    patterns: choose among the names of members.
    extensions: of images: EXTENSIONS, FIELDS or EVERY.

    The samples are unlabelled if fewer than two labels occur.
    Raises NoImageError without a sample, ConfigError for an unusable shard, and OSError if a
    shard cannot be read.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        indices = list(pool.map(lambda shard: _index(shard, patterns, extensions), shards))
    left_out = [json.loads(index.left_out) for index in indices]
    remarks = left_out_lines(left_out)
    if not any(len(index.keys) for index in indices):
        raise NoImageError(
            f"data.path: no image in {len(shards)} shards, {shards[0].name} the first"
            + "".join(f"; {line}" for line in remarks)
        )
    if numbering is None:
        used = [(index.members.label_names, np.unique(index.labels)) for index in indices]
        texts = {name.decode() for names, labels in used for name in names[labels[labels >= 0]]}
        where = f"{shards[0].name} or a later shard"
        numbering = number_labels(texts, _class_names(shards[0]), where)
    source = ShardSource(shards, indices, numbering, window)
    source.remarks = tuple(remarks)
    source.photos = extensions == EXTENSIONS
    return source


def _numbers(index: Index, numbering: Numbering) -> np.ndarray:
    """Returns the labels of a shard's samples, (n,) int64, -1 for no or an unknown label."""
    names = [name.decode() for name in index.members.label_names]
    # The last entry is for the label -1.
    table = np.array([*(numbering.number.get(name, -1) for name in names), -1], dtype=np.int64)
    return table[index.labels]


def _class_names(shard: TarShard) -> tuple[str, ...]:
    """Returns the class names in META beside the shard or in the folder above, () if
    there are none.
    """
    for folder in (shard.path.parent, shard.path.parent.parent):
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            return tuple(str(name) for name in meta["classes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


def _index(shard: TarShard, patterns: Patterns, extensions: Set[str]) -> Index:
    """Returns the index of a shard. Downloads a remote shard if the server has no usable index."""
    index = _whole_index(shard, extensions, old=not patterns)
    return index_of(index.shard_size, index.members, patterns) if patterns else index


def _whole_index(shard: TarShard, extensions: Set[str], old: bool) -> Index:
    if shard.url:
        end = index_name(extensions)
        place = Path(f"{shard.path}{end}")
        try:
            parts = urlsplit(shard.url)
            download(parts._replace(path=parts.path + end).geturl(), place)
            return read_index(place, old=old)
        except (HTTPError, NotStored, *UNREADABLE):  # none, or of another version
            place.unlink(missing_ok=True)
        try:
            download(shard.url, shard.path)
        except OSError as error:
            raise ConfigError(f"data.path: cannot fetch {shard.url}: {error}") from error
    return local_index(shard.path, extensions)
