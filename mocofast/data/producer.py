"""A thread that makes batches ahead of the training loop."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

from mocofast_kernels.cpu_threads import compute_alone

from mocofast.data.interface import Batch


class Batches(Protocol):
    """Makes batches in order, from any position."""

    def seek(self, epoch: int, step: int) -> None:
        """Sets the position of the next batch."""
        ...

    def next(self) -> Batch:
        """Returns the next batch. Only one thread at a time may call."""
        ...

    def close(self) -> None:
        """Ends all threads."""
        ...


class Producer:
    """A thread that keeps `ahead` batches ready, also across epochs."""

    def __init__(self, batches: Batches, ahead: int) -> None:
        self._batches = batches
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(ahead)

    def start(self, epoch: int, step: int) -> None:
        """Starts to make batches at a position. Drops the batches that are ready."""
        self.stop()
        self._batches.seek(epoch, step)
        self._stopped.clear()
        begun = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(begun,), name="mocofast-dali", daemon=True
        )
        self._thread.start()
        begun.wait()  # until then a new thread would take a wrong default number of threads

    def get(self) -> Batch:
        """Returns the next batch. Raises the error of the thread."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Ends the thread. Waits at most for the batch in the making."""
        if self._thread is None:
            return
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()  # the thread may wait for room in the queue
            self._thread.join(0.01)
        self._drain()
        self._thread = None

    def close(self) -> None:
        """Ends the thread and the pipeline."""
        self.stop()
        self._batches.close()

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get()

    def _run(self, begun: threading.Event) -> None:
        try:
            compute_alone()
        finally:
            begun.set()
        while not self._stopped.is_set():
            try:
                self._ready.put(self._batches.next())
            except BaseException as error:  # `get` raises the error in the training loop
                self._ready.put(error)
                return
