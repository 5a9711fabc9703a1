"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end, flushed to disk before.

    So `path` always has all of the old content or all of the new, also where the process or the machine stops
    halfway. After an error nothing is left. One writer at a time, or each with a name of its own, `writer`: what a
    killed one leaves is only overwritten by the next of the same name.
    """
    temporary = path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
