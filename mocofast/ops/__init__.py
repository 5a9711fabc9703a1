"""Losses, EMA, key queue and ghost BatchNorm as functions of tensors, on fused kernels.

Other training code can import this package alone. The package needs torch, but neither a GPU nor
Triton.
"""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.ops.batch_norm import ghost_batch_norm
    from mocofast.ops.losses import clip_loss, info_nce, nt_xent
    from mocofast.ops.memory import ema_update_, enqueue_, get_ema_multi_avg_fn

__all__ = [
    "clip_loss",
    "ema_update_",
    "enqueue_",
    "get_ema_multi_avg_fn",
    "ghost_batch_norm",
    "info_nce",
    "nt_xent",
]

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "batch_norm": ("ghost_batch_norm",),
        "losses": ("clip_loss", "info_nce", "nt_xent"),
        "memory": ("ema_update_", "enqueue_", "get_ema_multi_avg_fn"),
    },
)
