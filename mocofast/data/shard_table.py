"""The table of all samples of a set of shards: names, places and labels, a row a sample.

The table of a large set of local shards is kept in the cache folder as columns, which a process
maps (`mocofast.data.columns`). It is used while names, sizes and times of all shards stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit

import numpy as np

from mocofast import __version__, files
from mocofast.config import ConfigError
from mocofast.data import columns
from mocofast.data.columns import Columns
from mocofast.data.download import InvalidContent, NotStored, cache_folder, download
from mocofast.data.finding import ALL, Patterns
from mocofast.data.names import EXTENSIONS, checked_labels, digest, joined
from mocofast.data.shard_index import (
    Index,
    UnreadableIndex,
    index_name,
    index_of,
    local_index,
    read_index,
)
from mocofast.data.shard_places import TarShard, drop_outdated
from mocofast.data.shard_samples import Numbering, number_labels
from mocofast.data.tar_members import check_tar

log = logging.getLogger(__name__)

META = "meta.json"  # in the folder of shards. The entry "classes" names the labels
LARGEST_INDEX = 8 << 30  # bytes. A million samples have an index of some 100 MB
AT_ONCE = 8  # shards indexed in parallel: on a network disk every header is a wait
FEWEST = 100_000  # samples. The indices of a smaller set are read in a tenth of a second
_GROUP = 64  # shards whose indices are in memory together, while a table is written to a file


class Table(NamedTuple):
    """The N samples of S shards, in the order of the shards."""

    shard_sizes: tuple[int, ...]  # (S,), in bytes
    shard: np.ndarray  # (N,) int32: number of the sample's shard
    keys: np.ndarray  # (N,) bytes: names of the samples
    offsets: np.ndarray  # (N,) uint32 or int64: start of the image file in the shard, in bytes
    sizes: np.ndarray  # (N,), as `offsets`: length of the image file, in bytes
    texts: np.ndarray | None  # (N, 2), as `offsets`: start and length of captions. None: no caption
    labels: np.ndarray | None  # (N,) int64, -1 for an unlabelled sample
    numbering: Numbering  # of the labels
    fingerprint: str  # of the samples and the labels
    left_out: tuple[dict[str, Any], ...]  # (S,): of every shard, {reason: number of members}


class _Facts(NamedTuple):
    """What must be known of every shard before a table can be made."""

    shard_size: int  # bytes
    samples: int
    width: int  # of the keys, in bytes
    has_texts: bool
    labels: frozenset[str]  # that occur
    left_out: str  # JSON


def open_table(
    shards: Sequence[TarShard],
    numbering: Numbering | None = None,
    patterns: Patterns = ALL,
    extensions: Set[str] = EXTENSIONS,
) -> Table:
    """Returns the table of `shards`, kept or new. Arguments and errors: as `shards.open_shards`."""
    if any(shard.url for shard in shards):
        return _made(shards, numbering, patterns, extensions, None)
    place, of = _place_of(shards, numbering, patterns, extensions)
    if kept := _kept(place, of):
        return kept
    return _made(shards, numbering, patterns, extensions, (place, of))


def fingerprint_of(
    names: Iterable[str],
    shard: np.ndarray,
    keys: np.ndarray,
    labels: np.ndarray | None,
    classes: tuple[str, ...],
) -> str:
    """Returns a hash of the names of shards and samples, and of the labels.

    names: of the shards. Others: as in `Table`.
    """
    first = "\0".join(names).encode(errors="surrogateescape")
    numbers: tuple[bytes | memoryview, ...] = (first, b"\0", np.ascontiguousarray(shard).data)
    content = itertools.chain(numbers, joined(keys))
    return digest(content, labels, classes)


def _place_of(
    shards: Sequence[TarShard],
    numbering: Numbering | None,
    patterns: Patterns,
    extensions: Set[str],
) -> tuple[Path, str]:
    """Returns the file of a set's table, and the hash of all that the table depends on."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    classes = _class_names(shards[0]) if numbering is None else list(numbering.number.items())
    choice = [
        __version__,
        user,
        index_name(extensions),
        [patterns.include, patterns.exclude],
        numbering is None,
        classes,
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        states = list(pool.map(lambda shard: os.stat(shard.path), shards))
    paths = [os.path.realpath(shards[0].path.parent), *(str(shard.path) for shard in shards)]
    names = [shard.name for shard in shards]
    stamp = [[state.st_size, state.st_mtime_ns] for state in states]
    set_hash, of = (
        hashlib.blake2b(json.dumps(part).encode(errors="surrogateescape"), digest_size=12)
        for part in (
            [paths, [patterns.include, patterns.exclude], index_name(extensions)],
            [choice, paths, names, stamp],
        )
    )
    return cache_folder() / "shard_tables" / f"{set_hash.hexdigest()}.columns", of.hexdigest()


def _kept(place: Path, of: str) -> Table | None:
    """Returns the kept table. None: no table, the table of another state, or a damaged one."""
    try:
        if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
            return None
        found, facts = columns.read(place, lambda facts: facts["of"] == of)
        table = _table(found, facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("the shards are unchanged, so the table of samples is that of %s", place)
    return table


def _table(found: Columns, facts: dict[str, Any]) -> Table:
    classes, number = facts["numbering"]
    return Table(
        shard_sizes=tuple(facts["shard_sizes"]),
        shard=found["shard"],
        keys=found["keys"],
        offsets=found["offsets"],
        sizes=found["sizes"],
        texts=found.get("texts"),
        labels=found.get("labels"),
        numbering=Numbering(tuple(classes), number),
        fingerprint=facts["fingerprint"],
        left_out=tuple(map(json.loads, facts["left_out"])),
    )


def _made(
    shards: Sequence[TarShard],
    numbering: Numbering | None,
    patterns: Patterns,
    extensions: Set[str],
    keep: tuple[Path, str] | None,
) -> Table:
    """Returns a new table.

    keep: the file for a large table, and what it depends on. None keeps no table.
    """
    read = partial(_index, patterns=patterns, extensions=extensions)
    small: list[Index] | None = []  # all indices of a small set
    known: list[_Facts] = []
    count = 0
    for index in _each(shards, read):
        known.append(_facts(index))
        count += len(index.keys)
        if small is not None:
            small.append(_small(index))
            if keep is not None and count >= FEWEST:
                small = None
    if numbering is None:
        texts = frozenset[str]().union(*(facts.labels for facts in known))
        where = f"{shards[0].name} or a later shard"
        numbering = number_labels(set(texts), _class_names(shards[0]), where)
    shapes = _shapes(known, numbering)
    facts = {
        "shard_sizes": [facts.shard_size for facts in known],
        "numbering": [numbering.classes, numbering.number],
        "left_out": [facts.left_out for facts in known],
    }

    def fill(found: Columns) -> dict[str, Any]:
        _fill(found, _each(shards, read) if small is None else small, numbering)
        labels = checked_labels(found.get("labels"), count, numbering.classes)
        names = (shard.name for shard in shards)
        of_set = (found["shard"], found["keys"], labels, numbering.classes)
        return {**facts, "fingerprint": fingerprint_of(names, *of_set)}

    if small is None:
        assert keep is not None
        place, of = keep
        # Ranks of a machine start together. One makes the table, which the others then map.
        with contextlib.suppress(OSError, ConfigError), _locked(place):
            if kept := _kept(place, of):
                return kept
            columns.write(place, shapes, lambda found: {**fill(found), "of": of})
            if kept := _kept(place, of):
                return kept
    found = {name: np.empty(shape, kind) for name, (kind, shape) in shapes.items()}
    return _table(found, fill(found))


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Holds the lock of a table's file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as file:
        files.lock(file, wait=True)
        yield


def _each(shards: Sequence[TarShard], read: Callable[[TarShard], Index]) -> Iterator[Index]:
    """Yields the index of every shard, in order. Holds at most _GROUP indices."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(shards), _GROUP):
            yield from pool.map(read, shards[start : start + _GROUP])


def _facts(index: Index) -> _Facts:
    labels, names = index.labels, index.members.label_names
    used = names[np.unique(labels[labels >= 0])].tolist()
    return _Facts(
        index.shard_size,
        len(index.keys),
        index.keys.dtype.itemsize,
        bool(index.members.text_sizes.any()),
        frozenset(name.decode() for name in used),
        index.left_out,
    )


def _shapes(known: Sequence[_Facts], numbering: Numbering) -> columns.Shapes:
    """Returns the columns of a table."""
    count = sum(facts.samples for facts in known)
    largest = max((facts.shard_size for facts in known), default=0)
    place = np.dtype(np.uint32 if largest <= np.iinfo(np.uint32).max else np.int64)
    width = max((facts.width for facts in known if facts.samples), default=1)
    shapes: columns.Shapes = {
        "shard": (np.dtype(np.int32), (count,)),
        "keys": (np.dtype(f"S{width}"), (count,)),
        "offsets": (place, (count,)),
        "sizes": (place, (count,)),
    }
    if any(facts.has_texts for facts in known):
        shapes["texts"] = (place, (count, 2))
    if numbering.classes:
        shapes["labels"] = (np.dtype(np.int64), (count,))
    return shapes


def _fill(found: Columns, indices: Iterable[Index], numbering: Numbering) -> None:
    """Writes the samples of shards into columns."""
    start = 0
    for number, index in enumerate(indices):
        rows, members = slice(start, start := start + len(index.keys)), index.members
        found["shard"][rows] = number
        found["keys"][rows] = index.keys
        found["offsets"][rows] = index.offsets
        found["sizes"][rows] = index.sizes
        if "texts" in found:
            found["texts"][rows, 0] = members.text_offsets[index.chosen]
            found["texts"][rows, 1] = members.text_sizes[index.chosen]
        if "labels" in found:
            found["labels"][rows] = _numbers(index, numbering)


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
    return index._replace(members=index.members._replace(names=index.members.names[:0]))


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
