"""Schedules of learning rate and momentum, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mocofast.config import OptimConfig


def scaled_by_batch(config: OptimConfig, batch_size: int) -> OptimConfig:
    """Applies linear scaling (Goyal et al. 2017, arXiv:1706.02677): lr * batch_size / lr_per.

    config: `optim.lr` is the rate of a batch of `optim.lr_per` images. lr_per = 0: no scaling.
    batch_size: images per optimiser step, over all ranks.

    Returns a configuration with the scaled lr and lr_per = 0.
    """
    if not config.lr_per:
        return config
    return replace(config, lr=config.lr * batch_size / config.lr_per, lr_per=0)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate of an optimiser step. A resumed run needs nothing but the step.

    config: `optim.per` = "epoch" keeps the rate constant over an epoch, as facebookresearch/moco
        does. "step" changes the rate at every step. Warm-up and the cool-down of "wsd" change the
        rate at every step always.
    step: number of the optimiser step, from 0.
    steps_per_epoch: optimiser steps per epoch.
    epochs: length of the run.
    """
    # Warm-up: linear, to the base rate in the last step.
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
    if config.schedule == "wsd" and exact > (start := cooldown_start(config, epochs)):
        return config.lr * (1 - math.sqrt((exact - start) / config.cooldown_epochs))
    return config.lr


def cooldown_start(config: OptimConfig, epochs: int) -> float:
    """Returns the epoch at which schedule=wsd begins to lower the rate.

    The rate then falls as 1 - sqrt(share of the cool-down done), to 0 at the end of the run
    (Hagele et al. 2024, arXiv:2405.18392, section 3).
    """
    return epochs - config.cooldown_epochs


def cosine_momentum(momentum: float, step: int, total_steps: int) -> float:
    """Returns m of the key encoder's average at optimiser step `step`, which rises to 1 (MoCo v3).

    1 - (1 - m) (1 + cos(pi step / total_steps)) / 2 with m = `momentum`. Steps count from 0.
    """
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * step / total_steps)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameter groups: rate x "lr_scale" of groups that have it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
