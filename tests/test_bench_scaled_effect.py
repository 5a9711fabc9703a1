"""`mocofast_bench.scaled_effect` at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from mocofast_bench import scaled_effect
from PIL import Image

from mocofast.data import planning
from mocofast.data.loaders import dali_missing


def test_both_ways_are_trained_for_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(40):
            file = tmp_path / "cifar" / part / f"class{number % 2}" / f"{number:02d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    monkeypatch.setattr(scaled_effect, "IMAGES", {"train": 32, "test": 16})
    place = tmp_path / "place"
    scaled_effect.enlarge(tmp_path / "cifar", place)
    written = sorted(place.rglob("*.jpg"))
    assert [len(list((place / part).rglob("*.jpg"))) for part in ("train", "test")] == [32, 16]
    with Image.open(written[0]) as image:
        assert image.size == (64, 64)

    short = {"data.batch_size": 16, "train.epochs": 1, "model.queue_size": 32}
    monkeypatch.setattr(scaled_effect, "OPTIONS", scaled_effect.OPTIONS | short)
    factors: list[int] = []
    factor = planning.scaled_factor

    def seen(*arguments: object) -> int:
        factors.append(factor(*arguments))  # type: ignore[arg-type]
        return factors[-1]

    monkeypatch.setattr(planning, "scaled_factor", seen)
    saved = tmp_path / "rows.jsonl"
    command = [str(tmp_path / "cifar"), "--seeds", "2", "--save", str(saved)]
    assert scaled_effect.main(command) == 0
    (row,) = map(json.loads, saved.read_text().splitlines())
    assert {way: len(values) for way, values in row["knn"].items()} == {"full": 2, "scaled": 2}
    difference = fmean(row["knn"]["scaled"]) - fmean(row["knn"]["full"])
    assert row["points"] == pytest.approx(difference, abs=2e-3)
    assert row["standard_error"] >= 0
    assert min(map(min, row["cpu_seconds"].values())) > 0
    if not dali_missing():  # the torchvision loader decodes in processes of its own
        assert set(factors) <= {1, 2}
        assert factors.count(2) > 0.5 * len(factors)
