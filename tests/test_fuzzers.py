"""Short versions of the fuzzers of images, shards and HTTP. `make drills` runs the long ones."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter

import pytest

from tests.drills import http, images, inputs, shards


def defects(counts: Counter[str]) -> list[str]:
    return [name for name in counts if "DEFECT" in name]


def test_damaged_shards_and_indexes() -> None:
    counts = shards.main(1, 1000, 160)
    assert counts.total() == 160
    assert not defects(counts)
    assert counts["damaged_shard: refused"] > 30
    assert counts["damaged_index: makes the index again"] > 20


def test_damaged_answers_of_servers() -> None:
    counts = http.main(1, 1000, 60)
    assert counts.total() == 60
    assert not defects(counts)


@pytest.mark.parametrize("loader", ["torchvision"])
def test_damaged_images(loader: str, tmp_path: object) -> None:
    counts = Counter[str]()
    for seed in (1000, 1001):
        counts.update(images.run_round(loader, seed, tmp_path))  # type: ignore[arg-type]
    assert counts["files"] == 2 * images.DAMAGED
    assert counts["skipped"] > 10


def _inputs() -> None:
    sys.exit("\n".join(defects(inputs.main(2, 1000, 51))) or None)


def test_damaged_recipes_checkpoints_and_command_lines() -> None:
    """In a process without threads, which forks."""
    process = multiprocessing.get_context("forkserver").Process(target=_inputs)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("drill", [images, shards, http, inputs])
def test_ten_minutes_of_damage(drill: object) -> None:
    assert not defects(drill.main(10, 0))  # type: ignore[attr-defined]
