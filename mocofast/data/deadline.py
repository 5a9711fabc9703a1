"""A deadline for calls that may hang, like reads from a stalled network file system."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeAlias, TypeVar, cast

from mocofast.errors import UnreachableError, describe_error

T = TypeVar("T")

READ_SECONDS = 120.0  # for a local file, to read and to decode it
# Calls that may hang until a storage counts as stalled as a whole.
MOST_HANGING = 16
# A wait for a reader that another thread might have shortened. Small files on a local disk take
# less: there one thread reads faster than two, which wait for each other at Python's lock.
PATIENCE = 0.005

_Asked = tuple[Callable[..., Any], tuple[Any, ...]]


class _Hanging:
    """Counts calls that hang."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, seconds: float) -> None:
        """Counts a call without an answer for `seconds`. Raises UnreachableError for too many."""
        self._count += 1
        if self._count >= MOST_HANGING:
            raise UnreachableError(
                f"data: {self._count} files gave no answer within {seconds:g} s each, so their "
                "storage has stalled; a run continues with --resume auto when it answers again"
            )


_hanging = _Hanging()  # of `within`, in this process


class _Helper:
    """A thread that makes calls for the thread that owns the helper."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
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


def _forget_helper() -> None:
    """A forked process has none of the threads."""
    _owned.helper = None


if hasattr(os, "register_at_fork"):  # absent on Windows
    os.register_at_fork(after_in_child=_forget_helper)


def within(seconds: float, function: Callable[..., T], *arguments: Any) -> T:
    """Returns function(*arguments), or raises the exception. Raises TimeoutError after `seconds`.

    Another thread makes the call. A call that hangs keeps this thread, and the next call gets a
    new thread. Raises UnreachableError if MOST_HANGING calls have hung.
    """
    helper: _Helper | None = getattr(_owned, "helper", None)
    if helper is None:
        helper = _owned.helper = _Helper()
    helper.calls.put((function, arguments))
    try:
        result, error = helper.results.get(timeout=seconds)
    except queue.Empty:
        _owned.helper = None
        _hanging.add(seconds)
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    except BaseException:  # such as KeyboardInterrupt: a late result is not the next call's
        _owned.helper = None
        raise
    if error is not None:
        raise error
    return cast("T", result)


def in_time(seconds: float, function: Callable[..., T], *arguments: Any) -> T | str:
    """Returns function(*arguments), or why it gives no answer within `seconds`, which may be
    infinite. Raises what the function raises, and UnreachableError as `within`.
    """
    if math.isinf(seconds):
        return function(*arguments)
    try:
        return within(seconds, function, *arguments)
    except TimeoutError as error:
        return describe_error(error)


class Call(futures.Future[T]):
    """The result of a call of Readers. `began`: when a thread took the call, or None."""

    began: float | None = None
    given_up = False


_Share: TypeAlias = "deque[tuple[Call[Any], Callable[..., Any], tuple[Any, ...]]]"


class Readers:
    """Threads that read files. A call that hangs keeps a thread, and a new thread comes.

    The threads are daemons: a call that hangs does not keep the process from the end.
    """

    def __init__(self, count: int, seconds: float, name: str = "") -> None:
        """count: largest number of threads, one at first. A wait of PATIENCE starts one more.

        seconds: for every call, or infinity. name: of the threads.
        """
        self.seconds, self._count, self._name = seconds, 0, name
        self._most = count
        self._shares: queue.SimpleQueue[_Share | None] = queue.SimpleQueue()
        # By thread: the present call, and the rest of the thread's share
        self._running: dict[int, tuple[Call[Any], _Share]] = {}
        self._hanging = _Hanging()
        self._more()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Call[T]:
        """Starts a call as soon as a thread is free. `result` waits for the result."""
        return self.submit_all(function, [arguments])[0]

    def submit_all(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Call[T]]:
        """Starts many calls, in order. Every thread wakes once for its share of the calls."""
        calls = [Call[T]() for _ in arguments]
        every = [(call, function, given) for call, given in zip(calls, arguments)]
        for first in range(min(self._count, len(every))):
            self._shares.put(deque(every[first :: self._count]))
        return calls

    def result(self, call: Call[T]) -> T:
        """Returns the result of a call, or raises the exception.

        Raises TimeoutError if the call has run for `seconds`, and UnreachableError if MOST_HANGING
        calls have.
        """
        while True:
            slow = self._count < self._most and self._waiting()
            wait = min(self.seconds, PATIENCE if slow else math.inf)
            try:  # takes less time than futures.wait
                return call.result(None if math.isinf(wait) else wait)
            except futures.TimeoutError:
                if call.done():  # meanwhile, or with a TimeoutError of its own
                    return call.result()
            if slow and self._waiting():
                self._more()
            self._replace_hanging()
            if call.given_up:
                raise TimeoutError(f"no answer within {self.seconds:g} s")

    def close(self, drop: bool = True) -> None:
        """Ends the threads whose calls end. drop: drops calls that have not begun."""
        for _, share in list(self._running.values()) if drop else ():
            self._hand_on(share, len(share))
        while drop:
            try:
                for call, *_ in self._shares.get_nowait() or ():
                    call.cancel()
            except queue.Empty:
                break
        for _ in range(self._count):
            self._shares.put(None)

    def _waiting(self) -> bool:
        """Returns whether calls wait for a thread."""
        running = list(self._running.values())
        return not self._shares.empty() or any(share for _, share in running)

    def _more(self) -> None:
        """Starts one more thread, for half of the calls that wait for another thread."""
        self._count += 1
        for _, share in list(self._running.values()):
            self._hand_on(share, len(share) // 2)
        self._start()

    def _hand_on(self, share: _Share, count: int) -> None:
        """Takes the last `count` calls from a thread's share and makes them a new share."""
        taken: _Share = deque()
        with contextlib.suppress(IndexError):  # the thread was faster
            while len(taken) < count:
                taken.appendleft(share.pop())
        if taken:
            self._shares.put(taken)

    def _start(self) -> None:
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        me = threading.get_ident()
        while (share := self._shares.get()) is not None:
            while share:
                try:
                    taken = share.popleft()
                except IndexError:  # another thread was faster
                    break
                call, function, arguments = taken
                if not call.set_running_or_notify_cancel():
                    continue
                call.began, self._running[me] = time.monotonic(), (call, share)
                try:
                    call.set_result(function(*arguments))
                except BaseException as error:
                    call.set_exception(error)
                del self._running[me]
                if call.given_up:  # another thread has taken this thread's place
                    return
                del taken, call, function, arguments  # a waiting thread holds no file

    def _replace_hanging(self) -> None:
        for call, share in list(self._running.values()):
            began = call.began
            if began is None or call.given_up or time.monotonic() - began < self.seconds:
                continue
            call.given_up = True
            self._hand_on(share, len(share))
            self._start()
            self._hanging.add(self.seconds)
