"""Heartbeats: who hangs is named by what the ranks tell, and a pause of the process is no hang."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from mocofast import distributed, rendezvous
from mocofast.train import heartbeat
from mocofast.train.heartbeat import Heartbeat


def beat(count: int, place: str, idle: float, patient: bool = False) -> str:
    return json.dumps([time.time(), count, place, patient, idle])


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def heart(monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    """The heartbeat of rank 0 of three, whose limit is 10 s. The thread does not run."""
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 3))
    return Heartbeat(10)


def tell(store: dist.Store, *messages: str) -> None:
    for rank, message in enumerate(messages):
        store.set(f"beat/{rank}", message)


def test_the_rank_that_is_behind_is_suspected(heart: Heartbeat, store: dist.Store) -> None:
    tell(store, beat(7, "step 3", 11), beat(6, "the data of step 3", 12), beat(7, "step 3", 11))
    assert heart._look(store, 100.0) == [
        "made no progress for 10 s",
        {1: "the data of step 3"},
    ]


def test_a_silent_rank_is_suspected_first(heart: Heartbeat, store: dist.Store) -> None:
    for now in (100.0, 105.0, 109.0, 111.0):
        tell(store, beat(7, "step 3", now), beat(6, "the data of step 3", now))
        if now == 100.0:
            store.set("beat/2", beat(7, "step 3", 0))
        found = heart._look(store, now)
    assert found == ["told nothing for 10 s", {2: "step 3"}]


@pytest.mark.parametrize(
    "last", [beat(7, "step 3", 9), beat(7, "a copy", 99, True), "done"], ids=["busy", "patient", ""]
)
def test_ranks_that_may_take_time_raise_no_alarm(
    heart: Heartbeat, store: dist.Store, last: str
) -> None:
    tell(store, beat(7, "step 3", 9), beat(7, "step 3", 9), last)
    if last != "done" and json.loads(last)[3]:
        tell(store, beat(7, "step 3", 99), beat(7, "step 3", 99), last)
    assert heart._look(store, 100.0) == []


def test_a_rank_that_left_is_not_silent(heart: Heartbeat, store: dist.Store) -> None:
    for now in (100.0, 130.0):
        tell(store, beat(7, "the end", now, True), "done", "done")
        assert heart._look(store, now) == []


def test_the_report_has_every_stack_and_names_the_rank_that_waits_for_none(
    heart: Heartbeat, store: dist.Store
) -> None:
    for rank, waits in ((0, True), (1, False), (2, True)):
        store.set(f"stack/{rank}", json.dumps([waits, f"the stack of {rank}"]))
    said = heart._report(store, "made no progress", dict.fromkeys(range(3), "step 3"))
    assert "hanging: rank 1 at step 3: made no progress" in said
    assert all(f"rank {rank}: the stack of {rank}" in said for rank in range(3))


@pytest.mark.parametrize("answers", [False, True])
def test_a_rank_ends_if_the_store_does_not_answer(
    heart: Heartbeat, answers: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    def turn() -> None:
        for _ in range(20):
            heart._turns += answers
            time.sleep(0.02)
        heart._ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(heartbeat, "_ANSWER", 0.0)
    heart._limit, heart._interval = 0.2, 0.01
    turning = threading.Thread(target=turn)
    turning.start()
    if answers:
        heart._guard()
    else:
        with pytest.raises(SystemExit, match="77"):
            heart._guard()
    turning.join()
    said = capsys.readouterr().err
    assert ("rank 0 got no answer from the store" in said) is not answers


def test_ranks_of_a_new_start_never_meet_ranks_of_an_old_one() -> None:
    """The store keeps what the dead ranks of an earlier start wrote, as torchrun's store does."""
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    world = 3

    def meet(rank: int, found: dict[int, Any]) -> None:
        client = dist.TCPStore("127.0.0.1", server.port, world, False, wait_for_workers=False)
        found[rank] = rendezvous.gather(client, rank, world, time.monotonic() + 20)

    def start(ranks: range) -> dict[int, Any]:
        found: dict[int, Any] = {}
        threads = [threading.Thread(target=meet, args=(rank, found)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    # Ranks 1 and 2 of a start without rank 0 ask, and die.
    shared = dist.PrefixStore("mocofast", server)
    for rank in (1, 2):
        shared.set(f"asks/{rank}", f"dead{rank}")
    for _ in range(3):
        stores = start(range(world))
        assert len(stores) == world
        stores[1].set("key", "of rank 1")
        assert {store.get("key") for store in stores.values()} == {b"of rank 1"}
        assert not stores[0].check(["of an earlier start"])
        stores[0].set("of an earlier start", "")


def test_ranks_that_do_not_come_are_named() -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    with pytest.raises(TimeoutError, match="rank 1, 2 of 3 did not come in time"):
        rendezvous.gather(server, 0, 3, time.monotonic() + 0.1)
    with pytest.raises(TimeoutError, match="rank 1: no answer of rank 0"):
        rendezvous.gather(server, 1, 3, time.monotonic() + 0.1)
