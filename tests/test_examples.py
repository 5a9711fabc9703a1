"""The scripts in examples/ run and do what their docstrings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_find_their_descriptions_after_training_with_clips_loss() -> None:
    losses, accuracy = example("clip_pairs").train(epochs=3)
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy > 0.6  # chance is 0.1


def test_lightlys_training_code_has_the_same_losses_with_ours_in_place_of_its_own() -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    lightly_moco = example("lightly_moco")
    ours, theirs = (lightly_moco.train(epochs=2, fused=fused) for fused in (True, False))
    # The two sides round in another order over 28 steps of float32. With another negative,
    # temperature or normalisation the losses differ by 1e-2.
    assert ours == pytest.approx(theirs, abs=2e-3)
