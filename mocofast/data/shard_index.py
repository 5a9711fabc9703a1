"""The index of a tar shard: the place, size and label of every image file in the shard.

A shard is scanned once, header by header. The index is kept beside the shard as
`NAME.tar.index.npz`, or in the cache folder if the place is read-only. It is made again
if the size or the modification time of the shard changes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast import files
from mocofast.config import ConfigError
from mocofast.data.download import cache_folder
from mocofast.data.finding import ALL, Patterns
from mocofast.data.names import EXTENSIONS, FIELDS
from mocofast.data.numpy_files import read_arrays
from mocofast.data.shard_samples import MemberReader, Members, choose_samples, is_left_out
from mocofast.data.tar_members import PlainFile, TarMembers
from mocofast.errors import describe_error

log = logging.getLogger(__name__)

INDEX = ".index.npz"  # appended to the name of a shard
FIELDS_INDEX = ".fields.index.npz"  # of a shard whose images have extensions of FIELDS
FILES_INDEX = ".files.index.npz"  # of a shard whose files are read by a function of the user
# Version 3 has the columns of version 2. It was made from a shard with a whole end. Version 4 also
# has the places of captions.
INDEX_VERSION = 4
SERVED_VERSIONS = (2, 3, INDEX_VERSION)  # of an index on a server
_TEXTS = ("text_offsets", "text_sizes")
LONGEST_NAME = 4096  # bytes of a member's name
# What Python's tarfile raises for a damaged or hostile file.
_NO_TAR = (
    tarfile.TarError,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)


class UnreadableIndex(ValueError):
    """The file of an index is damaged, of a different version, or does not fit the shard."""


class Index(NamedTuple):
    """The n samples of one shard, and the images among which they were chosen."""

    shard_size: int  # of the whole file, in bytes
    keys: np.ndarray  # (n,) bytes: names of the samples
    chosen: np.ndarray  # (n,) int64: the image of every sample, a position in `members`
    left_out: str  # JSON: {reason: number of members}
    members: Members

    @property
    def offsets(self) -> np.ndarray:
        """Starts of the image files in the shard, (n,) int64, in bytes."""
        return self.members.offsets[self.chosen]

    @property
    def sizes(self) -> np.ndarray:
        """Lengths of the image files, (n,) int64, in bytes."""
        return self.members.sizes[self.chosen]

    @property
    def labels(self) -> np.ndarray:
        """Labels, (n,) int64: positions in `members.label_names`, -1 for no label."""
        return self.members.labels[self.chosen]


def index_of(shard_size: int, members: Members, patterns: Patterns = ALL) -> Index:
    """Returns the samples that `patterns` choose among the images of a shard."""
    names = [os.fsdecode(name) for name in members.names]
    keys, chosen, left_out = choose_samples(names, patterns)
    return Index(
        shard_size,
        np.array([os.fsencode(key) for key in keys], dtype=np.bytes_),
        np.array(chosen, dtype=np.int64),
        json.dumps({**members.left_out, **left_out}),
        members,
    )


def index_name(extensions: Set[str]) -> str:
    """Returns the end of the name of the index of images with some extensions."""
    return {EXTENSIONS: INDEX, FIELDS: FIELDS_INDEX}.get(frozenset(extensions), FILES_INDEX)


def local_index(path: Path, extensions: Set[str] = EXTENSIONS) -> Index:
    """Returns the index of a tar file. Reads the kept index, or makes and keeps a new one.

    extensions: of images: EXTENSIONS, FIELDS or EVERY.

    Raises ConfigError for a broken tar file.
    """
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    hashed = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    end = index_name(extensions)
    places = (Path(f"{path}{end}"), cache_folder() / "indices" / f"{hashed}{end}")
    for place in places:
        try:
            return read_index(place, stamp)
        except (
            OSError,
            UnreadableIndex,
        ):  # no index, the index of another shard, or a broken index
            continue
    log.info("indexing %s", path)
    with _no_collection():
        index = index_of(stat.st_size, _scan(path, extensions))
    for place in places:
        try:
            _write(place, stamp, index)
            break
        except (OSError, ConfigError):  # a read-only place, or a name that is taken
            continue
    return index


def read_index(place: Path, stamp: np.ndarray | None = None, old: bool = False) -> Index:
    """Reads an index from a file.

    stamp: version, size and modification time (in ns) of the shard. None accepts any shard.
    old: accept an index of version 1.
    Raises OSError if the file cannot be read, UnreadableIndex for a bad or
    outdated file.
    """
    try:
        return _read_index(place, stamp, old)
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise nearly any exception for damaged files
        raise UnreadableIndex(describe_error(error)) from error


def _read_index(place: Path, stamp: np.ndarray | None, old: bool) -> Index:
    kept = read_arrays(place)
    found = kept["stamp"]
    if found.shape != (3,) or found.dtype.kind != "i":
        raise ValueError("an index without the size of its shard")
    if old and found[0] == 1:
        return _checked(_read_first_version(kept))
    versions = SERVED_VERSIONS if stamp is None else (INDEX_VERSION,)
    if found[0] not in versions or (stamp is not None and not np.array_equal(found, stamp)):
        raise ValueError("an index of another version or file")
    text = {name: str(kept[name]) for name in ("left_out", "member_left_out")}
    if found[0] < INDEX_VERSION:
        kept |= dict.fromkeys(_TEXTS, np.zeros_like(kept["offsets"]))
    columns = {name: kept[name] for name in Members._fields[:-1]}
    members = Members(**columns, left_out=json.loads(text["member_left_out"]))
    return _checked(Index(int(found[1]), kept["keys"], kept["chosen"], text["left_out"], members))


def _checked(index: Index) -> Index:
    """Returns an index whose numbers fit together and fit the shard. Raises ValueError otherwise.

    A file in a cache or on a server may be damaged, or made to do harm.
    """
    members, count = index.members, len(index.members.names)
    captions = (members.text_offsets, members.text_sizes)
    columns = (members.offsets, members.sizes, members.labels, index.chosen, *captions)
    fits = (
        all(column.dtype == np.int64 and column.ndim == 1 for column in columns)
        and all(a.dtype.kind == "S" and a.ndim == 1 for a in (members.names, index.keys))
        and members.label_names.dtype.kind == "S"
        and len(members.offsets) == len(members.sizes) == len(members.labels) == count
        and all(len(column) == count for column in captions)
        and len(index.keys) == len(index.chosen)
        and _within(index.chosen, 0, count)
        and _within(members.labels, -1, len(members.label_names))
        and _within(members.offsets, 0, index.shard_size + 1)
        and _within(members.sizes, 0, index.shard_size + 1)
        and _within(members.offsets + members.sizes, 0, index.shard_size + 1)
        and all(_within(column, 0, index.shard_size + 1) for column in captions)
        and _within(members.text_offsets + members.text_sizes, 0, index.shard_size + 1)
        and is_left_out(json.loads(index.left_out))
        and is_left_out(members.left_out)
    )
    if not fits:
        raise ValueError("an index whose columns do not fit one another or the shard")
    return index


def _within(values: np.ndarray, low: int, high: int) -> bool:
    """Returns whether all values are in [low, high)."""
    return not len(values) or bool(low <= values.min() and values.max() < high)


def _read_first_version(kept: Mapping[str, np.ndarray]) -> Index:
    """Returns the content of an index of version 1, which servers may still hold.

    Version 1 knew integer labels, and no names of members.
    """
    keys, labels = kept["keys"], kept["labels"]
    numbers = np.unique(labels[labels >= 0])
    none = np.zeros_like(kept["offsets"])
    members = Members(
        np.char.add(keys, b".jpg") if len(keys) else keys,
        kept["offsets"],
        kept["sizes"],
        np.where(labels >= 0, np.searchsorted(numbers, labels), -1),
        numbers.astype(np.bytes_),
        none,
        none,
        {},
    )
    return Index(int(kept["stamp"][1]), keys, np.arange(len(keys)), "{}", members)


def _write(place: Path, stamp: np.ndarray, index: Index) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks or threads may index one shard at the same time, so temporary names
    # must differ.
    suffix = f"{os.getpid()}.{threading.get_ident()}"
    columns: dict[str, Any] = dict(zip(Members._fields[:-1], index.members[:-1]))
    columns |= {"stamp": stamp, "keys": index.keys, "chosen": index.chosen}
    columns |= {"left_out": index.left_out, "member_left_out": json.dumps(index.members.left_out)}
    with files.atomic_write(place, suffix) as part, part.open("wb") as file:
        np.savez(file, **columns)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside the block Python looks for no cycles of objects. The places of a shard form none, and
    are so many that Python would look through all objects of PyTorch: an eighth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _scan(path: Path, extensions: Set[str]) -> Members:
    """Reads all headers of a tar file."""
    reader = MemberReader(extensions)
    length = path.stat().st_size
    try:
        with TarMembers(path) as tar:
            for member in tar:
                is_plain = type(member) is PlainFile  # nearly all, told apart in the least time
                is_link = not is_plain and (member.islnk() or member.issym())
                if len(member.name) > LONGEST_NAME:
                    reader.leave_out(f"members with names of more than {LONGEST_NAME:,} characters")
                elif not is_plain and getattr(member, "sparse", None):
                    reader.leave_out("sparse files")
                elif is_plain or is_link or member.isreg():
                    if not 0 <= member.size <= length - member.offset_data and not is_link:
                        raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                    reader.add(member, member.linkname if is_link else None, tar.read)
            tar.check_end()
    except _NO_TAR as error:
        with path.open("rb") as file:
            packed = "; gunzip unpacks the file" if file.read(2) == b"\x1f\x8b" else ""
        raise ConfigError(
            f"data.path: {str(path)!r} is not a whole, uncompressed tar file: {error}{packed}; "
            "copy or make the file again"
        ) from error
    return reader.finish()
