"""The default run learns as well as the README says of `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

from tests import runs


def test_the_demo_learns_digits_without_labels(tmp_path: Path) -> None:
    """The thresholds lie below the README's figures: another CPU or seed gives other figures."""
    folder = tmp_path / "demo"
    runs.mocofast("pretrain", "--train.dir", str(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line for line in lines if "knn_top1" in line]
    assert before["knn_top1"] < 0.90
    assert after["knn_top1"] >= 0.965
    assert before["few_shot_top1"] < 0.70
    assert after["few_shot_top1"] >= 0.86
    assert all(line["images_per_second"] > 0 for line in lines if "loss" in line)
