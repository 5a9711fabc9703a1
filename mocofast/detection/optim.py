"""SGD and the schedule of the learning rate, counted in steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from mocofast.detection.options import TaskOptim


def learning_rate(optim: TaskOptim, batch_size: int, step: int, steps: int) -> float:
    """Returns the learning rate of a step, from 0, of a run of `steps` steps."""
    peak = optim.lr * (batch_size / optim.lr_per if optim.lr_per else 1)
    if optim.schedule == "cosine":
        rate = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
    elif optim.schedule == "step":
        rate = peak * 0.1 ** sum(step >= share * steps for share in optim.milestones)
    else:
        rate = peak
    return rate * min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else rate


def optimizer_of(model: nn.Module, optim: TaskOptim) -> torch.optim.SGD:
    """Returns SGD. Weights of BatchNorm are not decayed, as in detectron2."""
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters()
    }
    weights = [p for p in model.parameters() if p not in norms]
    groups = [
        {"params": weights, "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0},
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], optim.lr, optim.momentum)
