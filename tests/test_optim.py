"""Schedules against the reference's own rules, and which parameters are trained."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mocofast.config import OptimConfig
from mocofast.optim import build_optimizer, learning_rate, set_learning_rate


def rates(config: OptimConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    return [learning_rate(config, s, steps_per_epoch, epochs) for s in range(steps_per_epoch * epochs)]


def test_step_schedule_is_the_references_by_epoch() -> None:
    got = rates(OptimConfig(), 5, 200)
    for step, rate in enumerate(got):
        expected = 0.03
        for milestone in (120, 160):  # adjust_learning_rate of main_moco.py
            expected *= 0.1 if step // 5 >= milestone else 1.0
        assert rate == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_is_the_references_by_epoch() -> None:
    got = rates(OptimConfig(schedule="cosine"), 5, 200)
    for step, rate in enumerate(got):
        assert rate == pytest.approx(0.03 * 0.5 * (1.0 + math.cos(math.pi * (step // 5) / 200)), rel=1e-12)


def test_cosine_by_step_falls_at_every_step_to_almost_zero() -> None:
    got = rates(OptimConfig(schedule="cosine", per="step"), 7, 3)
    assert all(a > b for a, b in itertools.pairwise(got))
    assert got[0] == 0.03
    assert 0 < got[-1] < 0.03 * 0.01


def test_warm_up_rises_linearly_and_meets_the_schedule() -> None:
    config = OptimConfig(schedule="cosine", warmup_epochs=2, per="step", lr=1.0)
    got = rates(config, 10, 10)
    assert got[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert got[20] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(got[20:]))


def test_constant_stays() -> None:
    assert set(rates(OptimConfig(schedule="constant"), 3, 4)) == {0.03}


def test_sgd_follows_torchs_rule_in_float64_and_skips_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model.parameters(), OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1))
    weight, velocity = model.weight.detach().double(), None
    frozen = model.bias.detach().clone()
    for step in range(4):
        rate = 0.5 / (step + 1)
        set_learning_rate(optimizer, rate)
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.step()
        d = gradient.double() + 0.1 * weight
        velocity = d if velocity is None else 0.9 * velocity + d
        weight = weight - rate * velocity
    # Four steps of float32 rounding, about 1e-7 each, on values near 1.
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.bias, frozen)
