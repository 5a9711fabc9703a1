"""Builds the optimiser that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mocofast.config import OptimConfig
from mocofast.optim.fused import EMA, FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, ema: EMA | None = None
) -> FusedOptimizer:
    """Returns the optimiser `optim.name` of all trainable parameters.

    SGD and AdamW decay norms and biases too, as MoCo and MoCo v3 do.

    ema: (targets, momentum), with a target for every trainable parameter.
    """
    trainable = [p for p in parameters if p.requires_grad]
    optimizer: FusedOptimizer
    if config.name == "adamw":
        optimizer = FusedAdamW(
            trainable, config.lr, config.betas, weight_decay=config.weight_decay, ema=ema
        )
    else:
        kind = {"sgd": FusedSGD, "lars": FusedLARS}[config.name]
        optimizer = kind(
            trainable, config.lr, config.momentum, weight_decay=config.weight_decay, ema=ema
        )
    optimizer.clip_norm = config.clip_norm
    return optimizer
