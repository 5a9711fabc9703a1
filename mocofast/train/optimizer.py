"""The optimiser of a method."""

from __future__ import annotations

from mocofast.config import OptimConfig
from mocofast.methods.base import Method
from mocofast.optim.build import build_optimizer
from mocofast.optim.fused import FusedOptimizer


def optimizer_of(method: Method, config: OptimConfig) -> FusedOptimizer:
    """`build_optimizer` for all trainable parameters of a method; its steps average the momentum encoder, if any."""
    queries, keys = method.trained_pairs()
    paired = set(queries)
    others = [p for p in method.parameters() if p.requires_grad and p not in paired]
    if not queries:
        return build_optimizer(others, config)
    optimizer = build_optimizer(queries, config, ema=(keys, method.momentum))
    if others:  # heads that nothing follows
        optimizer.add_param_group({"params": others})
    return optimizer
