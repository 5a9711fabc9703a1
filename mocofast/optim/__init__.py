"""Optimisers that average the momentum encoder in the pass of their step, and schedules."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.optim.fused import FusedAdamW, FusedLARS, FusedSGD

__all__ = ["FusedAdamW", "FusedLARS", "FusedSGD"]

__getattr__, __dir__ = lazy_members(__name__, {"fused": ("FusedAdamW", "FusedLARS", "FusedSGD")})
