"""The index of a tar shard: the place, size and label of every image file in the shard.

A shard is scanned once, header by header. The index is kept beside the shard as
`NAME.tar.index.npz`, or in the cache folder if the place is read-only. It is made again
if the size or the modification time of the shard changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocofast import files
from mocofast.config import ConfigError
from mocofast.data.download import cache_folder
from mocofast.data.names import EXTENSIONS
from mocofast.data.tar_members import TarMembers

log = logging.getLogger(__name__)

INDEX = ".index.npz"  # appended to the name of a shard
INDEX_VERSION = 1
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension of a member
UNREADABLE = (ValueError, KeyError, zipfile.BadZipFile)  # errors of `read_index` for a bad file


class Index(NamedTuple):
    """The n samples of one shard."""

    shard_size: int  # of the whole file, in bytes
    keys: np.ndarray  # (n,) bytes: names without extension
    offsets: np.ndarray  # (n,) int64: start of the image file in the shard, in bytes
    sizes: np.ndarray  # (n,) int64: length of the image file, in bytes
    labels: np.ndarray  # (n,) int64, -1 for no label


def local_index(path: Path) -> Index:
    """Returns the index of a tar file. Reads the kept index, or makes and keeps a new one.

    Raises ConfigError for a broken tar file.
    """
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    hashed = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    places = (Path(f"{path}{INDEX}"), cache_folder() / "indices" / f"{hashed}{INDEX}")
    for place in places:
        try:
            return read_index(place, stamp)
        except (OSError, *UNREADABLE):  # no index, the index of another shard, or a broken index
            continue
    log.info("indexing %s", path)
    index = Index(stat.st_size, *_scan(path))
    for place in places:
        try:
            _write(place, stamp, index)
            break
        except OSError:  # a read-only place
            continue
    return index


def read_index(place: Path, stamp: np.ndarray | None = None) -> Index:
    """Reads an index from a file.

    stamp: version, size and modification time (in ns) of the shard. None accepts any shard.
    Raises OSError if the file cannot be read, or an error of UNREADABLE for a bad or
    outdated file.
    """
    with np.load(place, allow_pickle=False) as kept:
        found = kept["stamp"]
        if found[0] != INDEX_VERSION or (stamp is not None and not np.array_equal(found, stamp)):
            raise ValueError("an index of another version or file")
        return Index(int(found[1]), *(kept[field] for field in Index._fields[1:]))


def _write(place: Path, stamp: np.ndarray, index: Index) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    _, keys, offsets, sizes, labels = index
    # Several ranks or threads may index one shard at the same time, so temporary names
    # must differ.
    suffix = f"{os.getpid()}.{threading.get_ident()}"
    with files.atomic_write(place, suffix) as part, part.open("wb") as file:
        np.savez(file, stamp=stamp, keys=keys, offsets=offsets, sizes=sizes, labels=labels)


def _scan(path: Path) -> tuple[np.ndarray, ...]:
    """Reads all headers of a tar file. Returns keys, offsets, sizes and labels as in Index."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with TarMembers(path) as tar:
            for member in tar:
                match = NAME.fullmatch(member.name)
                if match is None or not member.isreg():
                    continue
                key, extension = match[1], match[2].lower()
                if f".{extension}" in EXTENSIONS:
                    images.setdefault(key, (member.offset_data, member.size))
                elif extension in ("cls", "json"):
                    label = _label(extension, tar.read(member))
                    if label >= 0 and (extension == "cls" or key not in labels):
                        labels[key] = label
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(
            f"data.path: {str(path)!r} is not a whole, uncompressed tar file: {error}"
        ) from error
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    keys = np.array([os.fsencode(key) for key in images], dtype=np.bytes_)
    found_labels = np.array([labels.get(key, -1) for key in images], dtype=np.int64)
    return keys, places[:, 0], places[:, 1], found_labels


def _label(extension: str, content: bytes) -> int:
    """Returns the label in a .cls or .json member, or -1 if there is none."""
    try:
        value = int(content) if extension == "cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return -1
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
