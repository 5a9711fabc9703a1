"""Decodes files in a separate process, which a file may end: `python -m mocofast.data.trial`.

The process writes a line when its decoders are loaded. Then it reads files from standard input: the
length, 8 bytes, and the content. A byte answers every file that has been decoded or refused, with a
reason on the same line.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from mocofast.data.interface import Source, view_sources
from mocofast.data.items import Item, opened
from mocofast.errors import describe_error, printable

COMMAND: tuple[str, ...] = (sys.executable, "-m", "mocofast.data.trial")
GOOD, PYTHON, BAD, FATAL = "gpbf"  # what a trial of a file shows
SECONDS = 60.0  # for a file
START_SECONDS = 600.0  # for the start of the process, which a busy machine makes slow


class Verdicts(NamedTuple):
    """What a trial of files has shown."""

    bad: dict[
        int, str
    ]  # samples to skip: {index: reason}. The file ends the process, or is refused
    python: tuple[int, ...]  # samples whose files DALI refuses and PIL decodes
    fatal: int  # number of files that end the process


def try_files(source: Source, samples: Sequence[int]) -> Verdicts:
    """Decodes the files of some samples one by one, and tells good files from bad and fatal ones.

    Files are decoded by DALI on the CPU, or by PIL where the loader takes PIL. Refused files count
    too: DALI may also die some time after an error.
    Files of functions of the user, and files that cannot be read, are left out.
    """
    bad: dict[int, str] = {}
    python: list[int] = []
    fatal = 0
    child: _Child | None = None
    try:
        files = ((index, part) for index in samples for part in view_sources(source))
        for index, part in files:
            content = _content(part, index)
            if content is None:
                continue
            child = child or _Child()
            kind, reason = child.decode(content)
            if kind == PYTHON:
                python.append(index)
            elif kind != GOOD:
                bad[index] = reason
            if kind == FATAL:
                fatal += 1
                child.close()
                child = None
    finally:
        if child is not None:
            child.close()
    return Verdicts(bad, tuple(python), fatal)


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
        # No file is to blame for a slow start.
        if not (self._answers_within(START_SECONDS) and self._stdout.readline()):
            self.close()
            raise RuntimeError(
                f"the process that tries images one by one did not start: {' '.join(COMMAND)}"
            )

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _answers_within(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def decode(self, content: bytes) -> tuple[str, str]:
        """Returns GOOD, PYTHON, BAD or FATAL for a file, and the reason of the last two."""
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(content).to_bytes(8, "little") + content)
            process.stdin.flush()
        if not self._answers_within(SECONDS):
            return FATAL, f"a decoder did not end within {SECONDS:g} s"
        if answer := self._stdout.readline():
            line = answer.decode(errors="replace").rstrip("\n")
            return line[:1], line[1:]
        status = process.wait()
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return FATAL, f"it ends the process that decodes it ({name})"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes the pipes
            pass


def _serve(files: BinaryIO, answers: BinaryIO) -> None:
    import mocofast.data.dali_pipeline
    import mocofast.data.probing  # noqa: F401

    answers.write(b"ready\n")
    answers.flush()
    while len(length := files.read(8)) == 8:
        kind, reason = _decode(files.read(int.from_bytes(length, "little")))
        answers.write(f"{kind}{printable(reason)}\n".encode())
        answers.flush()


def _decode(content: bytes) -> tuple[str, str]:
    from mocofast.data.decoding import decode, read_header
    from mocofast.data.probing import accepts

    try:
        by_dali = accepts(content, read_header(content))
        if by_dali and _dali_decodes(content):
            return GOOD, ""
        decode(content)
    except Exception as error:  # decoders raise nearly any exception
        return BAD, describe_error(error)
    return (PYTHON if by_dali else GOOD), ""


def _dali_decodes(content: bytes) -> bool:
    from mocofast.config import DataConfig
    from mocofast.data.dali_pipeline import decode_and_crop

    pipeline = decode_and_crop(
        lambda: [[np.frombuffer(content, np.uint8)]],
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
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
