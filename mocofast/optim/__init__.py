"""Optimisers that average the momentum encoder in the pass of their step, and schedules."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.optim.build import build_optimizer
    from mocofast.optim.fused import FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD

__all__ = ["FusedAdamW", "FusedLARS", "FusedOptimizer", "FusedSGD", "build_optimizer"]

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "build": ("build_optimizer",),
        "fused": ("FusedAdamW", "FusedLARS", "FusedOptimizer", "FusedSGD"),
    },
)
