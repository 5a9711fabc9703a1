"""Ctrl-C, SIGTERM and related signals: an answer within a second, and a clean end.

Python runs a signal handler only between two of its own instructions, and a training step can keep
the main thread in C++ code for minutes. A thread therefore reads the numbers of the signals, which
the interpreter writes to a pipe at once, and answers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_SYSTEM = 74  # EX_IOERR of sysexits.h: the system refuses a write, for example on a full disk
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again", which schedulers can act on
EXIT_DIVERGED = 76  # a run whose loss or weights are not finite
EXIT_HUNG = 77  # ranks that waited for a rank which hangs
EXIT_CTRL_C = 128 + signal.SIGINT  # the status that shells give a command that Ctrl-C ended
# Schedulers warn by SIGTERM, SIGUSR1 or SIGUSR2. A closed terminal sends SIGHUP.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_AT_ONCE = "stopping; Ctrl-C again ends at once"
_AFTER_STEP = "stopping after this step; Ctrl-C again ends at once"


class Stopped(KeyboardInterrupt):
    """A signal arrived where work can stop at once. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Watch:
    """Handles the signals of this process between `open` and `close`.

    The first signal raises Stopped in the main thread. Inside `after_steps` it only sets
    `requested`. A second Ctrl-C ends the process with status 130. (A launcher may send SIGTERM
    after Ctrl-C, so SIGTERM counts once.) `received` has the numbers of all signals.
    """

    def __init__(self) -> None:
        self.requested = False
        self.received: set[int] = set()
        self._steps = False
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._speaks = os.environ.get("RANK", "0") == "0"  # ranks get the same signal

    def open(self) -> None:
        """Takes the signals. Does nothing outside the main thread, as Python demands."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        if hasattr(os, "set_blocking"):  # absent on Windows before Python 3.12, and not asked for
            os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has SIGINT and SIGTERM alone
            # nohup ignores SIGHUP, and a shell ignores Ctrl-C for a job in the background.
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._answer, args=(self._pipe[0],), daemon=True).start()

    def close(self) -> None:
        """Gives the signals back."""
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # the thread reads the end of the file, and ends
        self._pipe = None

    @contextlib.contextmanager
    def after_steps(self) -> Iterator[None]:
        """Inside the block the first signal sets `requested` and raises nothing."""
        self._steps = True
        try:
            yield
        finally:
            self._steps = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.received.add(number)
        if not self._steps:
            raise Stopped(number)

    def _answer(self, pipe: int) -> None:
        signals = presses = 0
        while numbers := os.read(pipe, 1):
            if numbers[0] not in self._previous:
                continue
            signals, presses = signals + 1, presses + (numbers[0] == signal.SIGINT)
            if presses > 1:
                self._say("ended at once; a run continues from its last checkpoint")
                os._exit(EXIT_CTRL_C)
            if signals == 1:
                self._say(_AFTER_STEP if self._steps else _AT_ONCE)
            self.requested = True
        os.close(pipe)

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


_open: list[Watch] = []


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Yields the watch of this process. The outermost block opens and closes it."""
    if _open:
        yield _open[0]
        return
    watch = Watch()
    watch.open()
    _open.append(watch)
    try:
        yield watch
    finally:
        _open.clear()
        watch.close()


def drop_output() -> None:
    """Sends standard output to nowhere. Call it when the reader of the output has left."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _leave_to_parent() -> None:
    """In a forked process: the pipe belongs to the parent."""
    if _open:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):  # absent on Windows
    os.register_at_fork(after_in_child=_leave_to_parent)
