"""Stamps of the files of a source: whether their content may have changed since a checkpoint.

The fingerprint of a source is of names and labels. A stamp is of sizes, of times of modification,
and on request of the content. A copy of a set has new times.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator

import numpy as np

from mocofast.data import deadline
from mocofast.data.interface import Source, inner_sources

PIECE = 1 << 20  # bytes that are read at a time


def files_of(source: Source) -> Iterator[str]:
    """Yields the paths of the files of a source on a disk, in order. A source of URLs has none."""
    paths = getattr(source, "paths", None)
    if paths is not None:
        yield from paths()
    for inner in inner_sources(source):
        yield from files_of(inner)


def stamp_of(source: Source, content: bool) -> dict[str, str]:
    """Returns hashes of the sizes and the times of all files, and of the content if asked for.

    A file that cannot be read counts with size -1. {} for a source without files.
    """
    sizes, times, hashed = [], [], hashlib.blake2b(digest_size=16)
    for path in files_of(source):
        try:
            found = os.stat(path)
            sizes.append(found.st_size)
            times.append(found.st_mtime_ns)
            if content:
                hashed.update(_checksum(path))
        except OSError:
            sizes.append(-1)
            times.append(-1)
    if not sizes:
        return {}
    stamp = {name: _hash(values) for name, values in (("sizes", sizes), ("times", times))}
    return {**stamp, "content": hashed.hexdigest()} if content else stamp


def _hash(values: list[int]) -> str:
    numbers = np.array(values, dtype=np.int64)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def _checksum(path: str) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            hashed.update(piece)
    return hashed.digest()


class Stamp:
    """The stamp of a source, which a thread computes."""

    def __init__(self, source: Source, content: bool) -> None:
        """content: the stamp holds a checksum of all content. Reads every file."""
        seconds = math.inf if content else deadline.READ_SECONDS
        self._readers = deadline.Readers(1, seconds, "mocofast-stamp")
        self._call = self._readers.submit(stamp_of, source, content)
        self._readers.close(drop=False)

    def get(self) -> dict[str, str]:
        """Returns the stamp. {} where the storage does not tell within a deadline."""
        try:
            return self._readers.result(self._call)
        except TimeoutError:
            return {}


def changed(before: dict[str, str], now: dict[str, str]) -> str:
    """Returns "content", "sizes", "times" or "": what differs between two stamps of a source.

    Nothing differs from an empty stamp.

    A difference of the content, where both are known, or of the sizes comes before the times.
    """
    if not before or not now:
        return ""
    if "content" in before and "content" in now:
        return "content" if before["content"] != now["content"] else ""
    return next((k for k in ("sizes", "times") if before.get(k) != now.get(k)), "")
