"""Threads that work ahead of whoever takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Threads:
    """A pool for work outside the interpreter's lock, such as PIL's decoding and resizing. At its end what has not
    begun is dropped, and what has is waited for."""

    def __init__(self, count: int, name: str = "") -> None:
        """count: threads, at least one; name: what theirs begin with."""
        self.count = max(1, count)
        self._pool = ThreadPoolExecutor(self.count, name)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
        """function(item) of every item, in order; `ahead` of them in the making, or made, beside the one taken.

        Raises what `function` raises, in the place of its result.
        """
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
