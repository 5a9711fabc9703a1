"""The drill of timm's families: two models always, all families as a long drill."""

from __future__ import annotations

import time

import pytest

from tests.timm_families import drill_all, families, page, smallest


def test_a_model_goes_through_the_drill_and_a_slow_model_is_told() -> None:
    pytest.importorskip("timm")
    (good,) = drill_all(["test_resnet"], 120, time.monotonic() + 120)
    assert (good["stage"], good["equal"], good["unused"]) == ("", True, 0), good
    late, skipped = [
        next(iter(drill_all(["test_resnet"], seconds, time.monotonic() + left)))
        for seconds, left in ((0.01, 9), (9, -1))
    ]
    assert (late["stage"], skipped["stage"]) == ("time", "not run")
    text = page([good, {**late, "name": "another"}], 2)
    assert "| train a step | 1 | 100.0% |" in text and "| `another` | time |" in text


@pytest.mark.slow
def test_families_of_timm_train_load_and_export() -> None:
    pytest.importorskip("timm")
    known = families()
    names = dict.fromkeys(smallest(known[family]) for family in sorted(known))
    results = list(drill_all(names, 120, time.monotonic() + 3600))
    trained = [r for r in results if r["stage"] not in ("build", "step", "time", "not run")]
    assert len(trained) >= 0.99 * len(results), [r for r in results if r not in trained]
    assert sum(r["equal"] for r in results) >= 0.95 * len(results)
