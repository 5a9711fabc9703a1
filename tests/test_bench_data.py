"""`mocofast bench data` on a few small files: every loader is timed, and too few images are an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.bench import data, main
from mocofast.data.loaders import dali_missing
from mocofast.settings import ConfigError

BATCHES = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Just enough images for batches of 2."""
    for i in range(2 * (data.WARM_UP + BATCHES)):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    return tmp_path


def options(folder: Path) -> list[str]:
    short = ["--recipe", "cifar10_r18", "--batch-size", "2", "--workers", "1", "--repeats", "1", "--device", "cpu"]
    return ["data", str(folder), *short]


def test_the_row_has_the_rate_of_every_loader_relative_to_the_references(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(folder), "--batches", str(BATCHES)]) == 0
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])
    rates = row["pairs_per_second"]
    assert set(rates) == {"torchvision", "reference"} | (set() if dali_missing() else {"dali"})
    for name, rate in rates.items():
        assert rate > 0
        assert row["speedup"][name] == pytest.approx(rate / rates["reference"], rel=0.01)
        assert f"\n{name} " in out
    assert (row["images"], row["size"], row["workers"]) == (16, 32, 1)


def test_too_few_images_are_an_error_that_says_how_many_are_needed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"16 images make 8 batches of 2; 6 \+ 3 are needed"):
        main([*options(folder), "--batches", str(BATCHES + 1)])
