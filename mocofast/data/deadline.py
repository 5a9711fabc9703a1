"""A deadline for calls that may hang, such as reads from a network file system that has stalled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")

_Call = tuple[Callable[..., Any], tuple[Any, ...]]


class _Helper:
    """A thread that makes calls for the thread that owns the helper."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # A daemon: a call that hangs must not keep the process from its end.
        thread = threading.Thread(
            target=_work, args=(self.calls, self.results), name="mocofast-deadline", daemon=True
        )
        thread.start()

    def __del__(self) -> None:
        self.calls.put(None)  # the owner has ended, or has given the helper up


def _work(calls: queue.SimpleQueue[Any], results: queue.SimpleQueue[Any]) -> None:
    while (call := calls.get()) is not None:
        function, arguments = call
        try:
            results.put((function(*arguments), None))
        except BaseException as error:
            results.put((None, error))
        del call, function, arguments  # a waiting helper holds no image


_owned = threading.local()  # `helper` of every thread


def within(seconds: float, function: Callable[..., T], *arguments: Any) -> T:
    """Returns function(*arguments), or raises its exception. Raises TimeoutError after `seconds`.

    Another thread makes the call. A call that hangs keeps this thread, and the next call gets a
    new one.
    """
    helper: _Helper | None = getattr(_owned, "helper", None)
    if helper is None:
        helper = _owned.helper = _Helper()
    helper.calls.put((function, arguments))
    try:
        result, error = helper.results.get(timeout=seconds)
    except queue.Empty:
        _owned.helper = None
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    except BaseException:  # such as KeyboardInterrupt: a late result is not the next call's
        _owned.helper = None
        raise
    if error is not None:
        raise error
    return cast("T", result)
