"""The default run learns as well as the README says of `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

from mocofast import cli


def test_the_demo_learns_digits_without_labels(tmp_path: Path) -> None:
    """The thresholds lie below the README's figures: another CPU or seed gives other figures."""
    folder = tmp_path / "demo"
    assert cli.main(["pretrain", "--train.dir", str(folder), "--knn.every", "0"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line for line in lines if "knn_top1" in line]
    assert before["knn_top1"] < 0.90
    assert after["knn_top1"] >= 0.965
    assert before["few_shot_top1"] < 0.70
    assert after["few_shot_top1"] >= 0.86
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(110, 1101, 110))
    assert all(line["images_per_second"] > 0 for line in lines if "loss" in line)
