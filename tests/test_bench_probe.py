"""`mocofast bench probe` fits equal problems on both sides, and help of evaluation is light."""

from __future__ import annotations

import json

import pytest
from mocofast_bench.commands import main


def test_both_sides_fit_the_same_problem(capsys: pytest.CaptureFixture[str]) -> None:
    main(["probe", "--rows", "3000", "--dim", "16", "--classes", "4", "--repeats", "1"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["threads"] == 1
    for sides in row["sets"].values():
        ours, theirs = sides["mocofast"], sides["scikit-learn"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.005)
        assert 0.3 < ours["accuracy"] < 1
        assert sides["seven strengths"]["accuracy"] == pytest.approx(ours["accuracy"], abs=0.01)
    assert row["speedup"].keys() == row["seven_over_one"].keys() == row["sets"].keys()
