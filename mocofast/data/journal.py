"""A journal of the samples that are being decoded, which outlives a process that dies.

A decoder may end the process on a damaged file, without an exception. The journal then holds the
samples that were being decoded. `mocofast.data.trial` finds the file among them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_FINGERPRINT = 32  # bytes


class Journal:
    """The journal of one process. A file: fingerprint, count n, and n samples (int64)."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Opens a journal, which is empty. fingerprint: of the source."""
        self._path, self._fingerprint = path, fingerprint.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def note(self, samples: Sequence[np.ndarray]) -> None:
        """Writes the samples that are decoded from now on. samples: (n,) int64 each.

        The system keeps what was written when the process dies, so nothing waits for the disk.
        """
        every = np.concatenate(samples)
        os.pwrite(
            self._file, self._fingerprint + np.int64(len(every)).tobytes() + every.tobytes(), 0
        )

    def close(self) -> None:
        """Removes the journal: the process has ended without a death."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' journals, or the files found before
                self._path.parent.rmdir()


def read_journal(path: Path, fingerprint: str, count: int) -> list[int]:
    """Returns the samples that a process was decoding when it died, sorted.

    fingerprint: of the source. count: number of samples in the source.
    Returns none for the journal of a different source, or a damaged journal.
    """
    content = path.read_bytes()
    head = _FINGERPRINT + 8
    if len(content) < head or content[:_FINGERPRINT] != fingerprint.encode():
        return []
    number = int.from_bytes(content[_FINGERPRINT:head], "little")
    samples = np.frombuffer(content[head : head + len(content[head:]) // 8 * 8], np.int64)[:number]
    return sorted({int(i) for i in samples if 0 <= i < count})
