"""Threads that work ahead of the consumer of their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mocofast_kernels.cpu_threads import compute_alone

T = TypeVar("T")
U = TypeVar("U")


class Threads:
    """A pool of threads for work without Python's global lock, for example PIL's decoding.

    PyTorch's operators use one core a thread.

    A context manager. The end of the block drops calls that have not begun and waits
    for the rest.
    """

    def __init__(self, count: int, name: str = "") -> None:
        """count: number of threads, at least one. name: prefix of the threads' names."""
        self.count = max(1, count)
        self._pool = ThreadPoolExecutor(self.count, name, compute_alone)

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
