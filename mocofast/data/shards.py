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
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np

from mocofast.data.download import download
from mocofast.data.finding import ALL, Patterns
from mocofast.data.interface import epoch_order, order_type
from mocofast.data.names import EXTENSIONS
from mocofast.data.shard_index import INDEX
from mocofast.data.shard_places import TarShard
from mocofast.data.shard_samples import NoImageError, Numbering, left_out_lines
from mocofast.data.shard_table import Table, fingerprint_of, open_table
from mocofast.data.tar_members import check_tar
from mocofast.errors import UnreachableError
from mocofast.files import read_at

log = logging.getLogger(__name__)

LONGEST_TEXT = 65_536  # bytes of a caption


class ShardSource:
    """Samples of tar shards. `load` returns the content of an image file."""

    remarks: tuple[str, ...] = ()  # lines that say what was left out
    photos = True  # False for samples of FIELDS

    def __init__(self, shards: Sequence[TarShard], table: Table, window: int = 0) -> None:
        """shards: the shards of a table.
        window: number of shards that are shuffled together, see `order`. 0 for all.
        """
        self._shards, self._table, self._window = tuple(shards), table, window
        self.downloads = any(shard.url for shard in shards)
        self.labels, self.classes = table.labels, table.numbering.classes

    @property
    def numbering(self) -> Numbering:
        """The numbers of the classes."""
        return self._table.numbering

    def __len__(self) -> int:
        return len(self._table.keys)

    def name(self, index: int) -> str:
        """Returns the sample's name, shard.tar:key."""
        table = self._table
        return f"{self._shards[table.shard[index]].name}:{os.fsdecode(table.keys[index])}"

    def paths(self) -> Iterator[str]:
        """Yields the paths of the local shards."""
        return (str(shard.path) for shard in self._shards if not shard.url)

    def load(self, index: int) -> bytes:
        """Returns the content of the image file.

        Raises OSError if the shard cannot be read or downloaded, or has become shorter.
        """
        return self._read(index, int(self._table.offsets[index]), int(self._table.sizes[index]))

    def caption(self, index: int) -> str:
        """Returns the caption of an image, at most LONGEST_TEXT bytes. Raises as `load`."""
        offset, size = (0, 0) if self._table.texts is None else self._table.texts[index].tolist()
        content = self._read(index, offset, min(size, LONGEST_TEXT))
        return content.decode(errors="replace").strip()

    @property
    def has_caption(self) -> np.ndarray | None:
        """Tells which images have a caption, (N,) bool. None: no image."""
        if self._table.texts is None:
            return None
        has: np.ndarray = self._table.texts[:, 1] > 0
        return has if has.any() else None

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Returns a part of the shard of a sample. offset, size: in bytes."""
        number = self._table.shard[index]
        shard = self._shards[number]
        self._fetch(number)
        with shard.path.open("rb", buffering=0) as file:
            content = read_at(file.fileno(), size, offset)
        if len(content) < size:
            raise OSError(
                f"{shard.path} ends within {os.fsdecode(self._table.keys[index])}: "
                "it changed after its index"
            )
        return content

    def subset(self, index: np.ndarray) -> ShardSource:
        """Returns a source of some samples, with the same windows. index: (n,) int64,
        ascending.
        """
        part, table = copy.copy(self), self._table
        part.labels = None if self.labels is None else np.asarray(self.labels[index])
        part._table = table._replace(
            shard=np.asarray(table.shard[index]),
            keys=np.asarray(table.keys[index]),
            offsets=np.asarray(table.offsets[index]),
            sizes=np.asarray(table.sizes[index]),
            texts=None if table.texts is None else np.asarray(table.texts[index]),
            labels=part.labels,
            fingerprint="",  # made when it is asked for
        )
        return part

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the order of an epoch, (N,) integers, and starts to download missing
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
            numbers = np.arange(len(use) + 1, dtype=np.int32)
            bounds = np.searchsorted(self._table.shard, numbers).tolist()
            order, end = np.empty(len(self), order_type(len(self))), 0
            for first in range(0, len(use), self._window):
                begin = end
                for i in use[first : first + self._window].tolist():
                    start, end = end, end + bounds[i + 1] - bounds[i]
                    order[start:end] = np.arange(bounds[i], bounds[i + 1])
                rng.shuffle(order[begin:end])
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
        table = self._table
        if table.fingerprint and self.labels is table.labels:
            return table.fingerprint
        names = (shard.name for shard in self._shards)
        return fingerprint_of(names, table.shard, table.keys, self.labels, self.classes)

    def _fetch(self, number: int) -> None:
        """Downloads a shard if it is remote and missing. Raises OSError if this fails."""
        shard, expected = self._shards[number], self._table.shard_sizes[number]
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
    table = open_table(shards, numbering, patterns, extensions)
    remarks = left_out_lines(table.left_out, captions)
    if not len(table.keys):
        raise NoImageError(
            f"data.path: no image in {len(shards)} shards, {shards[0].name} the first"
            + "".join(f"; {line}" for line in remarks)
        )
    source = ShardSource(shards, table, window)
    source.remarks = tuple(remarks)
    source.photos = extensions == EXTENSIONS
    return source


def _size(path: Path) -> int:
    """Returns the size of a file in bytes, -1 for none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
