"""Builds the optimiser that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

from torch import nn

from mocofast.config import OptimConfig
from mocofast.optim.fused import EMA, FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    ema: EMA | None = None,
    undecayed: Set[nn.Parameter] = frozenset(),
) -> FusedOptimizer:
    """Returns the optimiser `optim.name` of all trainable parameters.

    SGD and AdamW decay norms and biases too, as MoCo and MoCo v3 do.

    ema: (targets, momentum), with a target for every trainable parameter.
    undecayed: parameters without weight decay, in a group of their own.
    """
    trainable = [p for p in parameters if p.requires_grad]
    groups = groups_of(trainable, undecayed)
    if ema is not None:  # in the order of the groups
        targets = dict(zip(trainable, ema[0]))
        ema = ([targets[p] for group in groups for p in group["params"]], ema[1])
    optimizer: FusedOptimizer
    if config.name == "adamw":
        optimizer = FusedAdamW(
            groups, config.lr, config.betas, weight_decay=config.weight_decay, ema=ema
        )
    else:
        kind = {"sgd": FusedSGD, "lars": FusedLARS}[config.name]
        optimizer = kind(
            groups, config.lr, config.momentum, weight_decay=config.weight_decay, ema=ema
        )
    optimizer.clip_norm = config.clip_norm
    return optimizer


def groups_of(
    parameters: Sequence[nn.Parameter], undecayed: Set[nn.Parameter]
) -> list[dict[str, Any]]:
    """Returns the groups of parameters: with the optimiser's weight decay, and without."""
    decayed = [p for p in parameters if p not in undecayed]
    free = [p for p in parameters if p in undecayed]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
