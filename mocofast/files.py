"""Atomic writing of files, reading of parts, files that only grow, and locks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mocofast.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("mocofast")

_AT_ONCE = 2**30  # bytes of a read: Linux ends it at 2^31 bytes, macOS and Windows refuse more
_moving = threading.Lock()  # held while the place in a file moves


@contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
    """Writes atomically: yields a temporary path, which is then fsynced and renamed to `path`.

    `path` always holds the complete old content or the complete new content, also after a crash of
    the process or the machine. After an exception the temporary file is removed. A link stays, and
    the file that it names is written.

    writer: name of the writer, part of the temporary path. Concurrent writers need different names.
        The next writer of the same name overwrites what a killed process has left.
    Raises ConfigError if something else than a regular file has the name (a device, a pipe).
    """
    path = regular_target(path)
    temporary = path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a link would lead elsewhere
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows syncs what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def regular_target(path: Path) -> Path:
    """Returns the file that a path names, after all links. The file need not exist.

    Raises ConfigError if `path` is no regular file, because a rename would replace it.
    """
    try:
        target = path.resolve()
        is_other = target.is_symlink() or (target.exists() and not target.is_file())
    except (OSError, RuntimeError):  # a link to itself
        is_other = True
    if is_other:
        raise ConfigError(
            f"{path}: expected the name of a file to write, and this is a folder, a device, a "
            "pipe, or a link to itself"
        )
    return target


def require_writable(folder: Path, option: str) -> None:
    """Raises ConfigError if a folder, which need not exist yet, cannot be written.

    Call it before long work. option: which chooses the folder.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{option}: {folder} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{option}: {folder} cannot be written: choose another folder")


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder to the disk, so that a rename outlives a crash of the machine.

    Does nothing on systems and file systems that cannot.
    """
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def read_at(file: int, size: int, place: int) -> bytes:
    """Returns bytes of an open file, fewer than `size` where the file ends.

    file: number of the file. Threads and forked processes may read a file at the same time.
    size, place: in bytes.
    """
    pieces, have = [], 0
    while have < size and (piece := _piece_at(file, min(size - have, _AT_ONCE), place + have)):
        pieces.append(piece)
        have += len(piece)
    return b"".join(pieces)


def _piece_at(file: int, size: int, place: int) -> bytes:
    """Returns some bytes, perhaps fewer than `size`. The place of the file stays."""
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    with _moving:  # Windows
        before = os.lseek(file, 0, os.SEEK_CUR)
        os.lseek(file, place, os.SEEK_SET)
        try:
            return os.read(file, size)
        finally:
            os.lseek(file, before, os.SEEK_SET)


def lock(file: IO[str], *, wait: bool) -> bool:
    """Locks an open file until it is closed, or its process ends. Returns False if it is locked.

    wait: wait for the lock, instead of returning False.
    Locks nothing, and returns True, on systems and file systems without such locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def as_json_knows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values, with None in place of NaN and infinity, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


class LineFile:
    """Appends lines to a file. Lines that the system refuses (a full disk) wait for the next write.

    The file holds whole lines only. The log names the file once a refusal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._waiting: list[bytes] = []
        self._end = path.stat().st_size if path.exists() else 0  # of the whole lines
        self._refused = False

    def write(self, line: str) -> None:
        """Appends a line, which ends with a line end."""
        self._waiting.append(line.encode())
        self._flush()

    def close(self) -> None:
        """Tries the waiting lines once more. Closes the file."""
        if self._waiting:
            self._flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _flush(self) -> None:
        content = b"".join(self._waiting)
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
            rest = content
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._refused:
                log.warning("%s", refusal(self._path, error))
            self._refused = True
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)  # without the part of a line
            return
        self._end += len(content)
        self._waiting.clear()
        self._refused = False


def refusal(path: Path, error: OSError) -> str:
    """Returns a sentence about a file that the system refuses to write."""
    return f"{path} cannot be written ({error.strerror or error}); the run goes on"
