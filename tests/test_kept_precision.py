"""A continued run keeps its precision, whatever `train.precision` auto takes on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mocofast import settings
from mocofast.config import ConfigError
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.run import train


def run(folder: Path, resume: str = "", **options: object) -> str:
    """Trains a ViT on digits up to a step. Returns the precision in the checkpoint."""
    config = settings.load_recipe("digits")
    given = {"train.dir": str(folder), "model.arch": "vit_micro_cifar", "train.epochs": 1}
    settings.apply(config, {**given, "knn.start": False, "knn.shots": 0, "knn.bank": 20})
    settings.apply(config, {f"train.{name}": value for name, value in options.items()})
    train(config, resume=resume)
    return str(load_checkpoint(folder)["precision"])


def test_a_continued_run_keeps_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def instructions(found: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found)

    instructions(False)
    assert run(tmp_path / "old", max_steps=1) == "fp32"
    instructions(True)  # which a new run takes
    assert run(tmp_path / "new", max_steps=1) == "bf16"
    assert run(tmp_path / "old", "auto", max_steps=2) == "fp32"
    assert run(tmp_path / "old", "auto", max_steps=3) == "fp32"
    assert run(tmp_path / "new", "auto", max_steps=2) == "bf16"
    assert "the run goes on in" not in capsys.readouterr().out
    instructions(False)
    assert run(tmp_path / "new", "auto", max_steps=3) == "fp32"
    assert "is of a run in bf16, and the run goes on in fp32" in capsys.readouterr().out


def test_auto_continues_what_was_asked_for_and_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for asked, kept in (("bf16", "bf16"), ("fp32", "fp32")):
        assert run(tmp_path / asked, max_steps=1, precision=asked) == kept
        assert run(tmp_path / asked, "auto", max_steps=2) == kept
    with pytest.raises(ConfigError, match=r"train\.precision: 'bf16', but the run to continue"):
        run(tmp_path / "fp32", "auto", precision="bf16")
    # An earlier version, whose auto was fp32, wrote no precision.
    assert run(tmp_path / "earlier", max_steps=1) == "bf16"
    last = tmp_path / "earlier" / "checkpoints" / "last.pt"
    saved = torch.load(last, weights_only=True)
    del saved["precision"]
    torch.save(saved, last)
    assert run(tmp_path / "earlier", "auto", max_steps=2) == "fp32"
