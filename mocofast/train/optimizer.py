"""Makes the optimiser of a method."""

from __future__ import annotations

from mocofast.config import OptimConfig
from mocofast.methods.base import Method
from mocofast.optim.build import build_optimizer, groups_of
from mocofast.optim.fused import FusedOptimizer


def optimizer_of(method: Method, config: OptimConfig) -> FusedOptimizer:
    """Returns `build_optimizer` for all trainable parameters of a method.

    Its steps also update the momentum encoder, if there is a momentum encoder.
    """
    queries, keys = method.trained_pairs()
    paired, undecayed = set(queries), set(method.undecayed())
    unpaired = [p for p in method.parameters() if p.requires_grad and p not in paired]
    if not queries:
        return build_optimizer(unpaired, config, undecayed=undecayed)
    ema = (keys, method.momentum)
    optimizer = build_optimizer(queries, config, ema=ema, undecayed=undecayed)
    for group in groups_of(unpaired, undecayed):  # heads without a moving average
        optimizer.add_param_group(group)
    return optimizer
