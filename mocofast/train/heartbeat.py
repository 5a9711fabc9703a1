"""Watches a run from a thread: ranks that hang are named, and no rank outlives its launcher.

A rank that hangs leaves the others waiting in a collective, for ever or until a time-out that names
nobody. So every rank tells the others, through the store of the process group, how far it is. A
rank is suspected if it tells nothing (stopped, machine dead), else if it is behind the others, else
if it waits for no other rank. All ranks then print their stacks and end, and torchrun can start
them again. A rank that gets no answer from the store ends alone: the network may be cut.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from mocofast import distributed
from mocofast.interrupts import EXIT_HUNG, EXIT_INTERRUPTED
from mocofast.rendezvous import wait_for

log = logging.getLogger("mocofast")

_WATCHERS = 2  # the first ranks watch all ranks. Rank 1 notices if rank 0 hangs.
_GRACE = 60.0  # seconds in which a run without a launcher may write its checkpoint
_ANSWER = 10.0  # seconds in which a rank tells its stack
_DONE = "done"  # the message of a rank that has left
# A main thread in these files waits for other ranks.
_WAITING = (os.path.join("torch", "distributed"), os.path.join("torch", "autograd", "graph"))


class Heartbeat:
    """Tells how far this rank is, and watches the others: `with Heartbeat(300) as heart: ...`.

    limit: seconds without progress after which a rank hangs. 0: never. A single process only logs
        its stack, once a standstill.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rank, self._world_size = distributed.rank_and_world_size()
        self._store = distributed.own_store()
        self._main = threading.get_ident()
        self._launcher = os.getppid() if launched() else 0
        self._interval = min(2.0, limit / 4) if limit else 2.0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="heartbeat", daemon=True)]
        if limit and self._store is not None:
            self._threads += [threading.Thread(target=self._guard, name="guard", daemon=True)]
        # What this rank tells. `at` and `alive` write, the thread reads.
        self._count, self._place, self._moved = 0, "the start", time.monotonic()
        self._patient = 0
        self._turns = 0  # of the thread `heartbeat`
        # What a watcher knows of every rank: the last message, and when another message came.
        self._heard: dict[int, tuple[bytes, float]] = {}

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self._store is not None:
            with contextlib.suppress(dist.DistError):
                self._store.set(f"beat/{self._rank}", _DONE)
                if self._rank == 0 and kind is None:
                    self._wait_for_all(self._store)

    def _wait_for_all(self, store: dist.Store) -> None:
        """Waits for ranks that still leave: without torchrun, the store ends with rank 0."""
        deadline = time.monotonic() + _ANSWER
        for rank in range(1, self._world_size):
            key = f"beat/{rank}"
            while not (store.check([key]) and store.get(key) == _DONE.encode()):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)

    def at(self, place: str) -> None:
        """Notes progress that all ranks make in the same order.

        place: in words, for example "the data of step 3".
        """
        self._count, self._place, self._moved = self._count + 1, place, time.monotonic()

    def alive(self) -> None:
        """Notes progress at the same place."""
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def patient(self, place: str) -> Iterator[None]:
        """Inside the block this rank may take any time, and the others may wait for it."""
        self.at(place)
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.alive()

    # ---- the threads ----

    def _watch(self) -> None:
        orphaned = warned = 0.0
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            self._turns += 1
            now = time.monotonic()
            if now - last > 2 * self._interval + 1:
                # This process stood still (Ctrl-Z, a machine that slept), and its messages too.
                self._moved, self._heard = now, {}
            last = now
            if self._launcher and os.getppid() != self._launcher:
                orphaned = self._leave(orphaned, now)
            if not self._limit:
                continue
            try:
                if self._store is not None:
                    self._exchange(self._store, now)
                elif not self._patient and now - max(self._moved, warned) > self._limit:
                    warned = now
                    log.warning("no progress for %.0f s. %s", self._limit, self._stack())
            except dist.DistError:
                if self._ended.is_set():
                    return
                # The store ends with rank 0 or its launcher.
                self._store = None
                print(f"rank {self._rank}: the launcher's store is gone", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
                orphaned = orphaned or now
        faulthandler.cancel_dump_traceback_later()

    def _guard(self) -> None:
        """Ends this rank if the store does not answer: TCP alone waits for 15 minutes."""
        turn, limit = -1, self._limit + 2 * _ANSWER  # an alarm may take 2 * _ANSWER
        since = last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if self._turns != turn or now - last > 2 * self._interval + 1:
                turn, since = self._turns, now
            last = now
            if now - since > limit:
                print(
                    f"hanging: rank {self._rank} got no answer from the store of the ranks for "
                    f"{limit:g} s. The host of the store is down, or the network between the hosts "
                    f"is cut. This rank ends with status {EXIT_HUNG}. It was {self._stack()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_HUNG)

    def _leave(self, since: float, now: float) -> float:
        """Ends a rank whose launcher has died, as SIGTERM does. Returns when that began."""
        if not since:
            print(f"rank {self._rank}: torchrun has ended; stopping", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
            return now
        if now - since > _GRACE:
            os._exit(EXIT_INTERRUPTED)
        return since

    def _exchange(self, store: dist.Store, now: float) -> None:
        """Tells how far this rank is. Looks at the others, and for an alarm."""
        # If another thread holds Python's lock for this long, a thread of C prints the stack.
        faulthandler.dump_traceback_later(self._limit, file=2)
        idle = now - self._moved
        told = [time.time(), self._count, self._place, bool(self._patient), idle]
        store.set(f"beat/{self._rank}", json.dumps(told))
        if self._rank < _WATCHERS and (suspects := self._look(store, now)):
            store.compare_set("alarm", "", json.dumps([self._rank, *suspects]))
        if store.check(["alarm"]):
            self._end_all(store)

    def _look(self, store: dist.Store, now: float) -> list[Any]:
        """Returns [why, {rank: place}] if ranks hang, else []."""
        told: dict[int, list[Any]] = {}
        silent: dict[int, str] = {}
        for rank in range(self._world_size):
            message = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
            if message == _DONE.encode():
                continue
            known, since = self._heard.get(rank, (b"", now))
            if message != known or rank not in self._heard:
                self._heard[rank] = (message, now)
                since = now
            place = json.loads(message)[2] if message else "the start"
            if now - since > self._limit:
                silent[rank] = place
            elif message:
                told[rank] = json.loads(message)
        if silent:
            return [f"told nothing for {self._limit:g} s", silent]
        if any(patient for _, _, _, patient, _ in told.values()):
            return []
        if not any(idle > self._limit for *_, idle in told.values()):
            return []
        fewest = min(count for _, count, *_ in told.values())
        behind = {rank: each[2] for rank, each in told.items() if each[1] == fewest}
        return [f"made no progress for {self._limit:g} s", behind]

    def _end_all(self, store: dist.Store) -> None:
        """Tells the stack of this rank. The rank of the alarm prints all. Ends the process."""
        speaker, why, places = json.loads(store.get("alarm"))
        waits, stack = self._waits(), self._stack()
        store.set(f"stack/{self._rank}", json.dumps([waits, stack]))
        if self._rank == speaker:
            log.error("%s", self._report(store, why, {int(r): p for r, p in places.items()}))
            store.set("said", "")
        wait_for(store, "said", time.monotonic() + 2 * _ANSWER)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(EXIT_HUNG)

    def _report(self, store: dist.Store, why: str, places: dict[int, str]) -> str:
        deadline = time.monotonic() + _ANSWER
        stacks, waiting = [], set()
        for rank in range(self._world_size):
            key = f"stack/{rank}"
            if wait_for(store, key, deadline):
                waits, stack = json.loads(store.get(key))
                waiting |= {rank} if waits else set()
                stacks.append(f"rank {rank}: {stack}")
            else:
                stacks.append(f"rank {rank}: no stack, because it does not answer")
        suspects = {rank: place for rank, place in places.items() if rank not in waiting} or places
        named = "; ".join(f"rank {rank} at {place}" for rank, place in suspects.items())
        return (
            f"hanging: {named}: {why}. All ranks end with status {EXIT_HUNG}. If a step takes "
            f"longer, raise --train.hang_after. Stacks of all ranks:\n" + "\n".join(stacks)
        )

    def _frames(self) -> traceback.StackSummary:
        frame = sys._current_frames().get(self._main)
        return traceback.extract_stack(frame) if frame else traceback.StackSummary()

    def _waits(self) -> bool:
        frames = self._frames()
        return bool(frames) and any(part in frames[-1].filename for part in _WAITING)

    def _stack(self) -> str:
        lines = "".join(self._frames().format()).rstrip()
        return f"at {self._place}, the main thread is in\n{lines}"


def launched() -> bool:
    """Returns whether torchrun's agent has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_launcher() -> None:
    """Asks torchrun's agent to end. Call it in a run that a signal has stopped.

    The agent takes every status of a rank but 0 for a failure, and would start the run again.
    """
    if launched() and os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)
