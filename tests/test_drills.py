"""Short versions of the drills of `make drills`, with one fault each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills import files, kills, ranks
from tests.drills.runs_to_kill import Figures


def test_a_killed_run_loses_nothing_before_its_last_checkpoint(tmp_path: Path) -> None:
    figures = kills.drill(2, 1, tmp_path)
    assert figures.good(), figures


def test_a_killed_rank_is_started_again_and_the_run_ends_equal(tmp_path: Path) -> None:
    figures = kills.drill(1, 2, tmp_path)
    assert figures.good(), figures


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(tmp_path: Path, victim: int) -> None:
    whole, figures = tmp_path / "whole", Figures()
    kills.whole_run(whole, 2)
    said = ranks.hang(tmp_path / "hung", whole, victim, 40, figures)
    assert figures.good(), figures
    assert f"hanging: rank {victim} at" in said
    log = (tmp_path / "hung.log").read_text()
    assert f"rank {victim}: no stack, because it does not answer" in log
    assert f"rank {1 - victim}: at " in log and "_step" in log


def test_ranks_end_when_their_agent_is_killed(tmp_path: Path) -> None:
    assert ranks.orphans(tmp_path / "run", 20) < 60


@pytest.mark.parametrize("whom", ["agent", "rank"])
def test_a_signal_to_agent_or_rank_ends_the_run_with_a_checkpoint(
    tmp_path: Path, whom: str
) -> None:
    """torchrun's own status is 1. The run does not start again."""
    assert ranks.stopped(tmp_path / "run", 20, whom) == (1, 0, 0)


def test_spoiled_checkpoints_never_change_a_run(tmp_path: Path) -> None:
    for kind, figures in files.spoiled_checkpoints(tmp_path, 4).items():
        assert figures.good(), kind


def test_a_full_disk_stops_no_run(tmp_path: Path) -> None:
    figures = files.full_disk(tmp_path, 2)
    if figures is None:
        pytest.skip("this user may mount no file system")
    assert figures.good(), figures


def test_of_two_starts_in_a_folder_one_wins(tmp_path: Path) -> None:
    assert files.two_starts(tmp_path, 1).good()
