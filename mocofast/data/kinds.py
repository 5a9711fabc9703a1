"""Kinds of files beside photos and TIFF: which reader reads a file, by its content.

PIL and DALI never see these files.
"""

from __future__ import annotations

from mocofast.data import numpy_files
from mocofast.data.items import FileReader, opened

_HEAD = 352  # bytes that tell the kind


def reader_of(file: str | bytes) -> FileReader | None:
    """Returns the reader of a file, or None for photos and TIFF. Raises OSError."""
    if isinstance(file, bytes):
        head = file[:_HEAD]
    else:
        with opened(file) as start:
            head = start.read(_HEAD)
    if head.startswith(numpy_files.MAGIC) or _is_npz(head):
        return numpy_files
    return None


def _is_npz(head: bytes) -> bool:
    """True for a zip archive whose first member is an array."""
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(b".npy")
