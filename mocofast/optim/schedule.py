"""Schedules of the learning rate and of the momentum encoder, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mocofast.config import ModelConfig, OptimConfig


def scaled_by_batch(config: OptimConfig, batch_size: int) -> OptimConfig:
    """`config` with the rate of a batch of `batch_size` images in place of that of `optim.lr_per` (Goyal et al. 2017,
    arXiv:1706.02677)."""
    return (
        replace(config, lr=config.lr * batch_size / config.lr_per, lr_per=0)
        if config.lr_per
        else config
    )


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
        return config.lr * config.gamma ** sum(
            epoch >= milestone for milestone in config.milestones
        )
    return config.lr


def key_momentum(config: ModelConfig, step: int, total_steps: int) -> float:
    """The momentum m of the key encoder's average at optimiser step `step` (from 0).

    `model.momentum_schedule` "cosine" is MoCo v3's: 1 - (1 - m) (1 + cos(pi step / total_steps)) / 2.
    """
    if config.momentum_schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / total_steps)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
