"""The ranks of one start meet, and share a store that no other start of the run has written to.

torchrun starts all ranks again after a rank has failed. All starts share the store of torchrun's
agent, which keeps the addresses of the dead ranks (pytorch/pytorch#135712). torchrun's number of
the start helps little: after the failure of one machine it differs between machines. So rank 0
names every start anew, and answers every process that asks.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

MINUTES = timedelta(minutes=10)  # that ranks wait for one another, at the start and in a collective
_PAUSE = 0.02  # seconds between two looks into the store


def meet(timeout: timedelta = MINUTES) -> tuple[dist.PrefixStore, int, int]:
    """Waits for all ranks that the environment of torchrun describes.

    Returns (store of this start, rank, world size).
    Raises TimeoutError, naming the ranks that did not come.
    """
    shared, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    deadline = time.monotonic() + timeout.total_seconds()
    return gather(shared, rank, world_size, deadline), rank, world_size


def gather(shared: dist.Store, rank: int, world_size: int, deadline: float) -> dist.PrefixStore:
    """Returns the store of this start, a part of `shared`, when all ranks have come.

    deadline: a time of time.monotonic(). Raises TimeoutError afterwards.
    """
    store = dist.PrefixStore("mocofast", shared)
    own = uuid.uuid4().hex
    if rank == 0:
        _answer(store, own, world_size, deadline)
        return dist.PrefixStore(own, store)
    # An answer to this process's own name cannot come from an earlier start.
    store.set(f"asks/{rank}", own)
    if not wait_for(store, f"answer/{own}", deadline):
        raise TimeoutError(f"rank {rank}: no answer of rank 0 in time")
    start = store.get(f"answer/{own}").decode()
    store.set(f"{start}/has/{rank}", "")
    return dist.PrefixStore(start, store)


def _answer(store: dist.Store, start: str, world_size: int, deadline: float) -> None:
    """Names the start to every rank that asks, until all ranks have taken the name."""
    missing, answered = set(range(1, world_size)), set()
    while missing:
        for rank in sorted(missing):
            # The question may be of an earlier start. The rank of this start then asks anew.
            if store.check([f"asks/{rank}"]):
                asking = store.get(f"asks/{rank}").decode()
                if asking not in answered:
                    answered.add(asking)
                    store.set(f"answer/{asking}", start)
            if store.check([f"{start}/has/{rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise TimeoutError(f"rank {ranks} of {world_size} did not come in time")
        time.sleep(_PAUSE if missing else 0)


def wait_for(store: dist.Store, key: str, deadline: float = float("inf")) -> bool:
    """Waits until a key is in the store. Returns False if the time of the clock passes `deadline`.

    deadline: a time of time.monotonic().
    (Store.wait holds the connection, and lets no signal through.)
    """
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True
