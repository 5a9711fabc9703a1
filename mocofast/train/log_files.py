"""The log and the TensorBoard events of a run, which never end the run."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocofast.files import refusal

log = logging.getLogger("mocofast")


class LogFile(logging.FileHandler):
    """A log file. Says once, on standard error, that it cannot be written."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._refused:
            self._refused = True
            print(refusal(Path(self.baseFilename), error), file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Board:
    """TensorBoard events. After an error of the system there are no further events."""

    def __init__(self, path: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second

        self._path = path
        self._writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._without_traceback
        with self._surviving():
            # A short queue would block for ever after its thread has ended.
            self._writer = SummaryWriter(str(path), purge_step=purge_step, max_queue=10_000)

    def add(self, name: str, value: float, step: int) -> None:
        """Adds a scalar."""
        if self._writer is not None:
            with self._surviving():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the events."""
        if self._writer is not None:
            with self._surviving():
                self._writer.close()
        threading.excepthook = self._hook

    def _without_traceback(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises the error again where the next scalar is added."""
        of_events = type(args.thread).__module__.startswith("tensorboard")
        if not (of_events and isinstance(args.exc_value, OSError)):
            self._hook(args)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the thread of TensorBoard wraps errors of the system
            self._writer = None
            log.warning("no further TensorBoard events in %s: %s", self._path, error)
