"""Numbers that follow a schedule: the loop sets them, and fixed buffers carry them to a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.base import Method
from mocofast.methods.moco import MoCo
from mocofast.methods.swav import SwAV
from mocofast.models.encoders import TinyResNet
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of

CPU = torch.device("cpu")
STEPS = 4


def falling(start: float) -> object:
    return lambda step, total_steps: start * (1 - 0.5 * step / total_steps)


def make(name: str) -> Method:
    torch.manual_seed(0)
    if name == "moco":
        method: Method = MoCo(TinyResNet, dim=16, queue_size=50, momentum=0.9)
        names = {"temperature": 0.2, "momentum": 0.9}
    else:
        method = SwAV(TinyResNet, 16, 24, 10, freeze_prototypes=0)
        names = {"temperature": 0.1, "epsilon": 0.05}
    method.schedules.update({attribute: falling(start) for attribute, start in names.items()})
    return method


def trajectory(name: str, mode: str, schedules: bool = True) -> list[Tensor]:
    method = make(name)
    if not schedules:
        method.schedules.clear()
    optimizer = optimizer_of(method, OptimConfig())
    engine = Engine(mode, method, optimizer, choose_autocast("fp32", CPU), 1, 8, None)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        engine.set_scheduled(step, STEPS, rate=0.1 / (step + 1))
        views = tuple(torch.randn(2, 8, 3, 8, 8, generator=generator))
        losses.append(engine.step(views).loss.clone())
        for attribute, schedule in method.schedules.items():
            number = getattr(method, attribute)
            assert isinstance(number, float)  # after the step, as the log and a checkpoint read it
            assert number == schedule(step, STEPS)
        assert optimizer.ema_momentum == method.momentum
        assert optimizer.param_groups[0]["lr"] == 0.1 / (step + 1)
    return [*losses, *method.state_dict().values()]


@pytest.mark.parametrize("name", ["moco", "swav"])
def test_the_step_on_fixed_buffers_reads_the_present_numbers(name: str) -> None:
    eager = trajectory(name, "eager")
    for ours, expected in zip(trajectory(name, "graph"), eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    # The schedule has an effect: frozen numbers give other losses from the second step on.
    frozen = trajectory(name, "graph", schedules=False)
    for step in range(1, STEPS):
        assert abs(float(frozen[step] - eager[step])) > 1e-3
