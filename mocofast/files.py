"""Atomic writing of files, and locks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
    """Writes atomically: yields a temporary path, which is then fsynced and renamed to `path`.

    `path` always holds the complete old content or the complete new content, also after a crash of
    the process or the machine. After an exception the temporary file is removed.

    writer: name of the writer, part of the temporary path. Concurrent writers need different names.
        The next writer of the same name overwrites what a killed process has left.
    """
    temporary = path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
