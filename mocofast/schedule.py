"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

import torch

from mocofast.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of optimiser step `step` (from 0). Stateless, so a resumed run needs nothing but its step.

    `optim.per` "epoch" holds the rate over an epoch, as facebookresearch/moco does; warm-up always moves by step.
    """
    exact = step / steps_per_epoch
    if exact < config.warmup_epochs:
        return config.lr * (step + 1) / (config.warmup_epochs * steps_per_epoch)
    epoch = float(step // steps_per_epoch) if config.per == "epoch" else exact
    if config.schedule == "cosine":
        span = epochs - config.warmup_epochs
        return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / span))
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
