"""Optimisers of a configuration."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mocofast.config import OptimConfig
from mocofast.optim.fused import EMA, FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, ema: EMA | None = None
) -> FusedOptimizer:
    """`optim.name` on every trainable parameter. SGD and AdamW decay norms and biases too, as MoCo's and MoCo v3's.

    ema: (targets, momentum), a target for each trainable parameter.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if config.name == "adamw":
        return FusedAdamW(
            trainable, config.lr, config.betas, weight_decay=config.weight_decay, ema=ema
        )
    kind = {"sgd": FusedSGD, "lars": FusedLARS}[config.name]
    return kind(trainable, config.lr, config.momentum, weight_decay=config.weight_decay, ema=ema)
