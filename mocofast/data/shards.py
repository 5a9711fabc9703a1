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
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.download import (
    InvalidContent,
    NotStored,
    download,
)
from mocofast.data.finding import ALL, Patterns
from mocofast.data.interface import epoch_order
from mocofast.data.names import EXTENSIONS, checked_labels, digest, joined
from mocofast.data.shard_index import (
    INDEX,
    Index,
    Members,
    UnreadableIndex,
    index_name,
    index_of,
    local_index,
    read_index,
)
from mocofast.data.shard_places import TarShard, drop_outdated
from mocofast.data.shard_samples import NoImageError, Numbering, left_out_lines, number_labels
from mocofast.data.tar_members import check_tar
from mocofast.errors import UnreachableError

log = logging.getLogger(__name__)

META = "meta.json"  # in the folder of shards. The entry "classes" names the labels
LONGEST_TEXT = 65_536  # bytes of a caption
LARGEST_INDEX = 8 << 30  # bytes. A million samples have an index of some 100 MB
AT_ONCE = 8  # shards indexed in parallel: on a network disk every header is a wait


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
        self.downloads = any(shard.url for shard in shards)
        self._shard_sizes = tuple(index.shard_size for index in indices)
        counts = [len(index.keys) for index in indices]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # (N,)
        self._keys = np.concatenate([index.keys for index in indices])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        members = [(index.members, index.chosen) for index in indices]
        self._texts: np.ndarray | None = None  # (N, 2): places of captions
        if any(m.text_sizes.any() for m, _ in members):
            self._texts = np.concatenate(
                [np.stack([m.text_offsets, m.text_sizes], 1)[chosen] for m, chosen in members]
            )
        self.numbering, self.classes = numbering, numbering.classes
        labels = [_numbers(index, numbering) for index in indices] if self.classes else None
        labels = None if labels is None else np.concatenate(labels)
        self.labels = checked_labels(labels, len(self), self.classes)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        """Returns the sample's name, shard.tar:key."""
        return f"{self._shards[self._shard[index]].name}:{os.fsdecode(self._keys[index])}"

    def paths(self) -> Iterator[str]:
        """Yields the paths of the local shards."""
        return (str(shard.path) for shard in self._shards if not shard.url)

    def load(self, index: int) -> bytes:
        """Returns the content of the image file.

        Raises OSError if the shard cannot be read or downloaded, or has become shorter.
        """
        return self._read(index, int(self._offsets[index]), int(self._sizes[index]))

    def caption(self, index: int) -> str:
        """Returns the caption of an image, at most LONGEST_TEXT bytes. Raises as `load`."""
        offset, size = (0, 0) if self._texts is None else self._texts[index].tolist()
        content = self._read(index, offset, min(size, LONGEST_TEXT))
        return content.decode(errors="replace").strip()

    @property
    def has_caption(self) -> np.ndarray | None:
        """Tells which images have a caption, (N,) bool. None: no image."""
        if self._texts is None:
            return None
        has: np.ndarray = self._texts[:, 1] > 0
        return has if has.any() else None

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Returns a part of the shard of a sample. offset, size: in bytes."""
        number = self._shard[index]
        shard = self._shards[number]
        self._fetch(number)
        with shard.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
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
        columns = (self._shard, self._keys, self._offsets, self._sizes)
        part._shard, part._keys, part._offsets, part._sizes = (column[index] for column in columns)
        part._texts = None if self._texts is None else self._texts[index]
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
        start: tuple[bytes | memoryview, ...] = (shards, b"\0", self._shard.data)
        content = itertools.chain(start, joined(self._keys))
        return digest(content, self.labels, self.classes)

    def _fetch(self, number: int) -> None:
        """Downloads a shard if it is remote and missing. Raises OSError if this fails."""
        shard, expected = self._shards[number], self._shard_sizes[number]
        if not shard.url or _size(shard.path) == expected:
            return
        begin = time.monotonic()
        try:
            # A copy of another size is not the shard of the index.
            keep = lambda: _size(shard.path) == expected  # noqa: E731
            fetched = download(shard.url, shard.path, check_tar, keep)
        except OSError as error:
            raise UnreachableError(f"cannot fetch {shard.url}: {error}") from error
        found = shard.path.stat().st_size
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


def open_shards(
    shards: Sequence[TarShard],
    window: int = 0,
    numbering: Numbering | None = None,
    patterns: Patterns = ALL,
    extensions: Set[str] = EXTENSIONS,
    captions: bool = False,
) -> ShardSource:
    """Returns a source of all samples of `shards`, in the order of the shards.

    window: see `ShardSource.order`.
    numbering: of the labels. If None, the names come from META beside the first
        shard or in the folder above, or are the labels (`number_labels`).
    patterns: choose among the names of members.
    extensions: of images: EXTENSIONS, FIELDS or EVERY.
    captions: captions are read.

    The samples are unlabelled if fewer than two labels occur.
    Raises NoImageError without a sample, ConfigError for an unusable shard, and OSError if a
    shard cannot be read.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        indices = list(pool.map(lambda shard: _small(_index(shard, patterns, extensions)), shards))
    left_out = [json.loads(index.left_out) for index in indices]
    remarks = left_out_lines(left_out, captions)
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
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return ()


def _index(shard: TarShard, patterns: Patterns, extensions: Set[str]) -> Index:
    """Returns the index of a shard. Downloads a remote shard if the server has no usable index."""
    index = _whole_index(shard, extensions, old=not patterns)
    return index_of(index.shard_size, index.members, patterns) if patterns else index


def _small(index: Index) -> Index:
    """Returns an index in less memory, without the names of images, which only `_index` needs."""
    members = index.members
    columns = members._asdict()
    for name in ("labels", "text_offsets", "text_sizes"):
        if len(column := columns[name]) and (column == column[0]).all():
            columns[name] = np.broadcast_to(column[:1].copy(), column.shape)
    for name in ("offsets", "sizes"):
        columns[name] = _narrow(columns[name])
    columns["names"] = members.names[:0]
    return index._replace(chosen=_narrow(index.chosen), members=Members(**columns))


def _narrow(column: np.ndarray) -> np.ndarray:
    """Returns numbers of at least 0 as uint32 if all fit."""
    return column if column.max(initial=0) > np.iinfo(np.uint32).max else column.astype(np.uint32)


def _whole_index(shard: TarShard, extensions: Set[str], old: bool) -> Index:
    if not shard.url:
        return local_index(shard.path, extensions)
    end = index_name(extensions)
    place = Path(f"{shard.path}{end}")
    drop_outdated(shard, place)
    try:
        parts = urlsplit(shard.url)
        download(parts._replace(path=parts.path + end).geturl(), place, largest=LARGEST_INDEX)
        return read_index(place, old=old)
    except (HTTPError, NotStored, InvalidContent, UnreadableIndex):  # none, or of another version
        place.unlink(missing_ok=True)
    for again in (False, True):
        try:
            download(shard.url, shard.path, check_tar)
        except OSError as error:
            raise ConfigError(f"data.path: cannot fetch {shard.url}: {error}") from error
        try:
            return local_index(shard.path, extensions)
        except ConfigError:  # a copy that is damaged, or was kept by an older version
            shard.path.unlink(missing_ok=True)
            if again:
                raise
    raise AssertionError


def _size(path: Path) -> int:
    """Returns the size of a file in bytes, -1 for none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
