"""Reads that never end, as from a stalled network file system: skipped and named after a deadline.

A read that waits for an event stands for the file system.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import deadline
from mocofast.data.deadline import Readers, within
from mocofast.data.device_loader import load_images
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import BatchSlice
from mocofast.data.items import opened
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.look import look
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.remarks import remarks
from mocofast.data.sources import FolderSource
from mocofast.errors import UnreachableError
from tests.pictures import files, save_photos

CPU = torch.device("cpu")
SECONDS = 0.4
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Yields the names of files whose reads wait until the end of the test."""
    names: set[str] = set()
    end = threading.Event()

    def wait(file: str | bytes) -> object:
        if isinstance(file, str) and Path(file).name in names:
            end.wait()
        return opened(file)

    monkeypatch.setattr(deadline, "READ_SECONDS", SECONDS)
    monkeypatch.setattr(deadline, "_hanging", deadline._Hanging())
    for module in ("kinds", "planning", "prepare"):
        monkeypatch.setattr(f"mocofast.data.{module}.opened", wait)
    yield names
    end.set()


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return files(save_photos(tmp_path / "photos"))


def test_a_call_has_a_deadline_and_later_calls_get_a_new_thread() -> None:
    end, me = threading.Event(), threading.get_ident()
    assert within(9, threading.get_ident) != me
    with pytest.raises(ZeroDivisionError):
        within(9, lambda: 1 / 0)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        within(0.2, end.wait)
    assert time.monotonic() - begin < 5
    assert within(9, lambda x: x + 1, 1) == 2
    end.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    assert within(9, int) == 0
    child = multiprocessing.get_context("fork").Process(target=within, args=(9, int))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_helpers_end_with_their_owners() -> None:
    def count() -> int:
        return sum(t.name == "mocofast-deadline" for t in threading.enumerate())

    before = count()
    for _ in range(20):
        owner = threading.Thread(target=within, args=(9, int))
        owner.start()
        owner.join()
    until = time.monotonic() + 10
    while count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert count() <= before


def test_readers_replace_threads_that_hang_and_accuse_no_waiting_call() -> None:
    end = threading.Event()
    readers = Readers(2, 0.5, "test-readers")
    calls = [readers.submit(end.wait) for _ in range(2)]
    calls += [readers.submit(lambda i=i: i) for i in range(40)]
    for call in calls[:2]:
        with pytest.raises(TimeoutError):
            readers.result(call)
    assert [readers.result(call) for call in calls[2:]] == list(range(40))
    # Results that nobody waits for keep no thread either.
    for _ in range(2):
        readers.submit(end.wait)
    assert readers.result(readers.submit(lambda: "answer")) == "answer"
    for _ in range(deadline.MOST_HANGING):
        readers.submit(end.wait)
    with pytest.raises(UnreachableError, match=r"their storage has stalled; .*--resume auto"):
        readers.result(readers.submit(int))
    end.set()
    readers.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_does_not_answer_is_skipped_and_named(
    source: FolderSource, stalled: set[str], loader: str
) -> None:
    def batches() -> tuple[list[torch.Tensor], dict[int, str]]:
        data = DataConfig(loader=loader, workers=0 if loader == "torchvision" else 2)
        stream = build_loader(source, data, (AugmentConfig(size=19),), BatchSlice(23), 3, CPU)
        views = [batch.views[0][batch.index.argsort()] for batch in stream.epoch(0)]
        stream.close()
        return views, stream.skipped

    (whole,), none = batches()
    assert not none
    stalled |= {"004.jpg", "005.jpg", "017.jpg"}
    (views,), skipped = batches()
    assert {source.name(i) for i in skipped} == stalled
    assert set(skipped.values()) == {f"TimeoutError: no answer within {SECONDS} s"}
    # The other images show the same views.
    same = [bool((view == whole).flatten(1).all(1).any()) for view in views]
    assert sum(same) >= 20


@pytest.mark.parametrize("loader", LOADERS)
def test_a_storage_that_stalls_as_a_whole_ends_the_run_with_words(
    source: FolderSource, stalled: set[str], loader: str
) -> None:
    stalled |= {source.name(i) for i in range(len(source))}
    data = DataConfig(loader=loader, workers=0 if loader == "torchvision" else 4)
    stream = build_loader(source, data, (AugmentConfig(size=19),), BatchSlice(23), 3, CPU)
    with pytest.raises(UnreachableError, match="storage has stalled"):
        next(stream.epoch(0))
    stream.close()


def test_evaluation_prepare_and_the_start_go_on_without_the_file(
    source: FolderSource, stalled: set[str], tmp_path: Path
) -> None:
    stalled.add("004.jpg")
    batches = EvalBatches(source, 16, 8, 1, CPU)
    assert sum(len(index) for _, _, index in batches) == 22
    assert list(batches.skipped) == [4]
    meta = prepare(source.root, str(tmp_path / "out"), PrepareConfig(workers=1))
    assert list(meta["skipped"]) == ["004.jpg"]
    assert remarks(source) == []
    assert "004.jpg (TimeoutError" in look(source, None, 16)[0]


def test_the_device_loader_skips_the_file(tmp_path: Path, stalled: set[str]) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    stalled.add("2.png")
    loaded = load_images(files(tmp_path, labelled=False), CPU)
    assert list(loaded.skipped) == [2]
    assert loaded.shown.tolist() == [0, 1, 3, 3]
    assert np.asarray(loaded.images[3])[0, 0, 0] == 3


def test_a_slow_share_is_divided_and_the_rest_of_a_hanging_share_is_made_elsewhere() -> None:
    readers = Readers(3, 0.6, "test-shares")
    end, made = threading.Event(), []

    def make(number: int) -> int:
        if number == 2:
            end.wait()
        time.sleep(2 * deadline.PATIENCE)
        made.append((threading.get_ident(), number))
        return number

    calls = readers.submit_all(make, [(number,) for number in range(30)])
    for number, call in reversed(list(enumerate(calls))):
        if number == 2:
            with pytest.raises(TimeoutError):
                readers.result(call)
        else:
            assert readers.result(call) == number
    assert sorted(number for _, number in made) == [i for i in range(30) if i != 2]
    assert len({thread for thread, _ in made}) >= 3
    end.set()
    readers.close()


def test_closed_readers_drop_the_calls_that_have_not_begun() -> None:
    readers = Readers(1, 10.0, "test-closed")
    begun, end, made = threading.Event(), threading.Event(), []

    def make(number: int) -> None:
        made.append(number)
        begun.set()
        end.wait()

    calls = readers.submit_all(make, [(number,) for number in range(9)])
    begun.wait()
    readers.close()
    end.set()
    calls[0].result(9)
    assert all(call.cancelled() for call in calls[1:])
    assert made == [0]
