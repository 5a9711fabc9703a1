"""Losses, EMA, key queue and ghost BatchNorm as functions of tensors, on fused kernels.

Other training code can import this package alone. The package needs torch, but neither a GPU nor
Triton.
"""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.ops.batch_losses import clip_loss, nt_xent, siglip_loss
    from mocofast.ops.batch_norm import ghost_batch_norm
    from mocofast.ops.known_gradients import unit_gradient
    from mocofast.ops.losses import info_nce
    from mocofast.ops.memory import ema_update_, enqueue_, get_ema_multi_avg_fn
    from mocofast.ops.supervised import supervised_contrastive

__all__ = [
    "clip_loss",
    "ema_update_",
    "enqueue_",
    "get_ema_multi_avg_fn",
    "ghost_batch_norm",
    "info_nce",
    "nt_xent",
    "siglip_loss",
    "supervised_contrastive",
    "unit_gradient",
]

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "batch_norm": ("ghost_batch_norm",),
        "batch_losses": ("clip_loss", "nt_xent", "siglip_loss"),
        "losses": ("info_nce",),
        "memory": ("ema_update_", "enqueue_", "get_ema_multi_avg_fn"),
        "supervised": ("supervised_contrastive",),
        "known_gradients": ("unit_gradient",),
    },
)
