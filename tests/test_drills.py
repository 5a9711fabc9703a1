"""Short versions of the drills of `make drills`, with one fault each, on runs of 110 steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs
from tests.drills import elastic, files, kills, ranks
from tests.drills.runs_to_kill import Figures, words

STEPS = 110


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of one process without a fault."""
    folder = tmp_path_factory.mktemp("one") / "whole"
    runs.mocofast(*words(folder, STEPS))
    return folder


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of two ranks without a fault."""
    return kills.whole_run(tmp_path_factory.mktemp("two") / "whole", 2, STEPS)


def test_a_killed_run_loses_nothing_before_its_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    figures = kills.kill_a_run(tmp_path / "run", whole, 1, 1, 0, STEPS)
    assert figures.good(), figures


def test_a_killed_rank_is_started_again_and_the_run_ends_equal(
    tmp_path: Path, whole_of_two: Path
) -> None:
    figures = kills.kill_a_run(tmp_path / "run", whole_of_two, 2, 1, 0, STEPS)
    assert figures.good(), figures


def test_stopped_and_hung_ranks_end_and_the_run_goes_on_to_equal_bits(
    tmp_path: Path, whole_of_two: Path
) -> None:
    """A run meets a signal to torchrun's agent, a signal to a rank, and two hung ranks.

    After a signal torchrun's own status is 1, the run does not start again, and no step is lost.
    Rank 1 notices the hang of rank 0, and rank 0 the hang of rank 1.
    """
    folder, figures = tmp_path / "run", Figures()
    assert ranks.stopped(folder, 10, "agent", STEPS) == (1, 0, 0)
    assert ranks.stopped(folder, 25, "rank", STEPS) == (1, 0, 0)
    said = ranks.hang(folder, whole_of_two, {1: 55, 0: 75}, figures, STEPS, kill=True)
    assert figures.good(), figures
    log = folder.with_suffix(".log").read_text()
    for victim, line in zip((1, 0), said):
        assert f"hanging: rank {victim} at" in line
        assert f"rank {victim}: no stack, because it does not answer" in log
        assert f"rank {1 - victim}: at " in log and "_step" in log


def test_ranks_end_when_their_agent_is_killed(tmp_path: Path) -> None:
    assert ranks.orphans(tmp_path / "run", 20) < 60


@pytest.mark.slow
def test_machines_die_and_come_and_no_step_or_image_is_lost(tmp_path: Path) -> None:
    drill = elastic.Drill(tmp_path, turns=3, seed=0)
    assert drill.run().good(), drill.line()
    assert drill.kills == 5  # 4 machines, then 1, 3 and 2


def test_spoiled_checkpoints_never_change_a_run(tmp_path: Path) -> None:
    for kind, figures in files.spoiled_checkpoints(tmp_path, 4).items():
        assert figures.good(), kind


def test_a_full_disk_stops_no_run(tmp_path: Path, whole: Path) -> None:
    figures = files.full_disk(tmp_path, whole, 1, 0, STEPS)
    if figures is None:
        pytest.skip("this user may mount no file system")
    assert figures.good(), figures


def test_of_two_starts_in_a_folder_one_wins(tmp_path: Path, whole: Path) -> None:
    assert files.two_starts(tmp_path, whole, 1, STEPS).good()
