"""fp16 with a scaled loss: equal steps, steps that overflow, and the scaler's state in checkpoints.

The CPU runs the code of the GPU. Only the speed and the kernels differ there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mocofast import MoCo, cli
from mocofast.config import ConfigError
from mocofast.device import choose_autocast, loss_scaler
from mocofast.models.encoders import TinyResNet
from mocofast.optim import FusedSGD
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.engine import Engine

CPU = torch.device("cpu")


class Steps:
    """A small MoCo and its engine."""

    def __init__(
        self, precision: str, scale: float = 0.0, clip_norm: float = 0.0, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(0)
        self.model = MoCo(TinyResNet, dim=8, queue_size=32).to(device)
        queries, keys = self.model.trained_pairs()
        optimizer = FusedSGD(queries, 0.1, 0.9, ema=(keys, 0.9))
        optimizer.clip_norm = clip_norm
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale) if scale else None
        autocast = choose_autocast(precision, device)
        self.engine = Engine("eager", self.model, optimizer, autocast, 2, 4, scaler=self.scaler)

    def step(self, count: int = 1) -> dict[str, torch.Tensor]:
        for _ in range(count):
            views = (torch.randn(8, 3, 8, 8) for _ in range(2))
            device = next(self.model.parameters()).device
            self.engine.step(tuple(view.to(device) for view in views))
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(clip_norm: float) -> None:
    plain = Steps("fp32", clip_norm=clip_norm).step(3)
    scaled = Steps("fp32", 2.0**10, clip_norm).step(3)
    # The norm of the clipping rounds after the division by the scale, as without a scale.
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_steps_in_fp16_are_close_to_steps_in_fp32() -> None:
    plain, half = Steps("fp32").step(3), Steps("fp16", 2.0**10).step(3)
    start = Steps("fp32").model.state_dict()
    moved = sum((plain[n] - start[n]).square().sum() for n in plain).sqrt()
    apart = sum((plain[n] - half[n]).square().sum() for n in plain).sqrt()
    assert apart < 0.02 * moved  # measured: 0.003


def test_a_step_that_overflows_is_left_out_and_the_scale_falls() -> None:
    steps = Steps("fp16", 2.0**40)
    assert steps.scaler is not None
    before = {n: p.detach().clone() for n, p in steps.model.named_parameters()}
    queue = steps.model.queue.clone()
    after = steps.step()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert steps.scaler.get_scale() == 2.0**39
    assert not torch.equal(queue, steps.model.queue)  # the keys are right
    for _ in range(40):
        after = steps.step()
    assert steps.scaler.get_scale() < 2.0**30
    assert not any(torch.equal(before[n], after[n]) for n in before if n.endswith("conv1.weight"))
    assert all(value.isfinite().all() for value in after.values())


def test_the_precision_chooses_the_scaler() -> None:
    assert loss_scaler(choose_autocast("auto", CPU), "eager") is None
    assert loss_scaler(choose_autocast("bf16", CPU), "eager") is None
    half = choose_autocast("fp16", CPU)
    assert half.fast_dtype == torch.float16
    assert isinstance(loss_scaler(half, "compile"), torch.amp.GradScaler)
    with pytest.raises(ConfigError, match=r"engine.mode: graph cannot skip a step"):
        loss_scaler(half, "graph")


def test_gpus_without_bf16_take_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda, "is_available", lambda: True)
        assert choose_autocast("auto", device).fast_dtype == dtype


def test_a_continued_run_has_the_scale_and_the_bits_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    options = ("--train.device", "cpu", "--data.workers", "0", "--model.queue_size", "300")
    words = ["pretrain", "digits", *options, "--knn.start", "false", "--knn.every", "0"]
    words += ["--train.precision", "fp16"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*words, "--train.max_steps", "6", "--train.dir", str(whole)]) == 0
    assert cli.main([*words, "--train.max_steps", "3", "--train.dir", str(parts)]) == 0
    saved = load_checkpoint(parts)["scaler"]
    assert saved["scale"] == 2.0**16 and saved["_growth_tracker"] == 3
    assert cli.main(["pretrain", "--resume", str(parts), "--train.max_steps", "6"]) == 0
    ours, theirs = load_checkpoint(parts), load_checkpoint(whole)
    assert ours["scaler"] == theirs["scaler"]
    assert all(torch.equal(ours["model"][n], theirs["model"][n]) for n in ours["model"])
    assert "fp16 autocast" in (whole / "train.log").read_text()


@pytest.mark.gpu
def test_on_a_gpu_an_overflow_is_left_out_and_later_steps_train() -> None:
    steps = Steps("fp16", 2.0**40, device=torch.device("cuda"))
    assert steps.scaler is not None
    before = {n: p.detach().clone() for n, p in steps.model.named_parameters()}
    after = steps.step()
    assert all(torch.equal(before[name], after[name]) for name in before)
    after = steps.step(40)
    assert steps.scaler.get_scale() < 2.0**30
    assert not torch.equal(before["encoder_q.conv1.weight"], after["encoder_q.conv1.weight"])
    assert all(value.isfinite().all() for value in after.values())
