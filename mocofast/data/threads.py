"""Threads that work ahead of the consumer of their results."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


class Threads:
    """A pool of threads for work without Python's global lock, for example PIL's decoding.

    A context manager. The end of the block drops calls that have not begun and waits
    for the rest.
    """

    def __init__(self, count: int, name: str = "") -> None:
        """count: number of threads, at least one. name: prefix of the threads' names."""
        self.count = max(1, count)
        self._pool = ThreadPoolExecutor(self.count, name)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
        """Yields function(item) for every item, in order. Works up to `ahead` items ahead.

        Raises the exceptions of `function`, in the place of the result.
        """
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Returns threads whose PyTorch operators use one core per thread."""
    used = torch.get_num_threads()
    all_started = threading.Barrier(threads + 1)

    def start() -> None:
        # The first call in a thread sets the thread's number to the process's default. A
        # number that was set before this call would be lost.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(threads, "mocofast-views", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    all_started.wait()
    # The number belongs to a thread, but the default of later threads has changed too: set
    # it back.
    torch.set_num_threads(used)
    return pool
