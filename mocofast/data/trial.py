"""Decodes files in a separate process, which a file may end: `python -m mocofast.data.trial`.

The process reads files from standard input: the length, 8 bytes, and the content. A byte answers
every file that has been decoded or refused.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from mocofast.data.interface import Source
from mocofast.data.items import Item, opened

COMMAND: tuple[str, ...] = (sys.executable, "-m", "mocofast.data.trial")
SECONDS = 60.0  # for a file. The first file also waits for the start of the process


def fatal_files(source: Source, samples: Sequence[int]) -> dict[int, str]:
    """Returns the samples whose files end a process that decodes them, {index: reason}.

    Files are decoded by DALI on the CPU, or by PIL where the loader takes PIL.
    Files of functions of the user, and files that cannot be read, are left out.
    """
    fatal: dict[int, str] = {}
    child: _Child | None = None
    try:
        for index in samples:
            content = _content(source, index)
            if content is None:
                continue
            child = child or _Child()
            if reason := child.fails(content):
                fatal[index] = reason
                child.close()
                child = None
    finally:
        if child is not None:
            child.close()
    return fatal


def _content(source: Source, index: int) -> bytes | None:
    item = source.load(index)
    if isinstance(item, (np.ndarray, Item)):
        return None
    try:
        with opened(item) as file:
            return file.read()
    except OSError:
        return None


class _Child:
    """A process that decodes files one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def fails(self, content: bytes) -> str:
        """Returns why the process ends or hangs on a file, or ""."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(content).to_bytes(8, "little") + content)
            process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(SECONDS):
                return f"a decoder did not end within {SECONDS:g} s"
        if process.stdout.read(1):
            return ""
        status = process.wait()
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"it ends the process that decodes it ({name})"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes the pipes
            pass


def _serve(files: BinaryIO, answers: BinaryIO) -> None:
    from mocofast.config import DataConfig
    from mocofast.data.dali_pipeline import decode_and_crop
    from mocofast.data.decoding import decode, read_header
    from mocofast.data.probing import accepts

    while len(length := files.read(8)) == 8:
        content = files.read(int.from_bytes(length, "little"))
        with contextlib.suppress(Exception):  # the loader skips files that are refused
            if accepts(content, read_header(content)):
                pipeline = decode_and_crop(
                    lambda content=content: [[np.frombuffer(content, np.uint8)]],
                    (),
                    False,
                    bytes,
                    DataConfig(),
                    batch_size=1,
                    num_threads=1,
                    device_id=None,
                    prefetch_queue_depth=1,
                    exec_dynamic=True,
                )
                pipeline.build()
                pipeline.run()
            else:
                decode(content)
        answers.write(b".")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
