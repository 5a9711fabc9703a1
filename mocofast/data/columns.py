"""Files of columns that stay in the file: a process maps the file, and memory holds no copy.

A file holds the bytes of arrays, one after the other, then a table of the arrays in JSON, then
_END. The table has a CRC-32 of all bytes before it.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mocofast import files

Columns = dict[str, np.ndarray]
Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]  # {name: (dtype, shape)}
_END = struct.Struct("<QI12s")  # length of the table in bytes, its CRC-32, _MAGIC
_MAGIC = b"mocofast-col"
_PIECE = 1 << 22  # bytes that are read at a time
_ALIGNED = 64  # bytes: the start of an array is a multiple of it


class Column(np.memmap):
    """An array (N, ...) in a file. Another process that gets the array maps the file itself."""

    def __reduce__(self) -> Any:
        mapped = getattr(self, "_mmap", None)
        if mapped is None or self.base is not mapped:  # a part, or the result of a calculation
            return np.asarray(self).__reduce__()
        place = (str(self.filename), self.dtype.str, self.offset, self.shape)
        return _mapped, (*place, _identity(place[0]))


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns


def _mapped(
    path: str, kind: str, offset: int, shape: tuple[int, ...], identity: tuple[int, int]
) -> Column:
    if _identity(path) != identity:
        raise OSError(f"{path} was replaced while a worker started; start again")
    return Column(path, kind, "r", offset, shape)


def write(
    place: Path,
    shapes: Shapes,
    fill: Callable[[Columns], dict[str, Any]],
) -> None:
    """Writes a file of columns atomically.

    fill: writes the values of the columns, and returns more facts for the table, as JSON knows.
    Raises OSError where the file cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(place, str(os.getpid())) as part:
        table, end = {}, 0
        for name, (kind, shape) in shapes.items():
            table[name] = [kind.str, end, list(shape)]
            size = kind.itemsize * int(np.prod(shape))
            end += -(-size // _ALIGNED) * _ALIGNED
        with part.open("wb") as file:
            # A full disk ends the process where a mapped page has no place: take the place first.
            if end and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, end)
            file.truncate(end)
        columns: Columns = {
            name: np.memmap(part, kind, "r+", start, tuple(shape))
            if np.prod(shape)
            else np.empty(shape, kind)
            for name, (kind, start, shape) in table.items()
        }
        facts = fill(columns)
        columns.clear()  # writes to the file
        content = json.dumps(
            {"columns": table, "crc": _checksum(part, end), "facts": facts}
        ).encode()
        with part.open("ab") as file:
            file.write(content + _END.pack(len(content), zlib.crc32(content), _MAGIC))


def read(place: Path, accept: Callable[[dict[str, Any]], bool]) -> tuple[Columns, dict[str, Any]]:
    """Maps a file. Returns the columns, for reading alone, and the facts of `write`.

    Reads all bytes once, so that damage is found now.
    accept: returns whether the facts are those of the wanted columns.
    Raises OSError for no file, ValueError for other columns, and ValueError, KeyError or TypeError
    for a damaged file.
    """
    with place.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        length, crc, magic = _END.unpack(file.read().rjust(_END.size, b"\0"))
        start = size - _END.size - length
        if magic != _MAGIC or start < 0:
            raise ValueError("no file of columns")
        file.seek(start)
        content = file.read(length)
    if zlib.crc32(content) != crc:
        raise ValueError("a damaged table of columns")
    table = json.loads(content)
    if not accept(table["facts"]) or _checksum(place, start) != table["crc"]:
        raise ValueError("other or damaged columns")
    columns: Columns = {
        name: Column(place, kind, "r", offset, tuple(shape))
        if np.prod(shape)
        else np.empty(shape, kind)
        for name, (kind, offset, shape) in table["columns"].items()
    }
    return columns, table["facts"]


def _checksum(place: Path, length: int) -> int:
    """Returns the CRC-32 of the first bytes of a file. Reads pieces, which take no memory."""
    found = 0
    with place.open("rb") as file:
        while length > 0 and (piece := file.read(min(_PIECE, length))):
            found = zlib.crc32(piece, found)
            length -= len(piece)
    return found
