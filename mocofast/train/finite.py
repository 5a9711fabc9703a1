"""Whether weights are numbers: a run that diverged holds NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.ops.local import local_tensor


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all values of the floating tensors, on one device, are finite.

    Scalars may be infinite: see `is_bound`. Of sharded tensors this rank's parts.
    """
    parts = [local_tensor("tensors", t.detach()) for t in tensors if t.is_floating_point()]
    floating = [t for t in parts if t.numel() and not is_bound(t)]
    if not floating:
        return True
    # The largest magnitude of a tensor is NaN or infinite if a value is.
    largest = torch._foreach_norm(floating, math.inf)
    return bool(torch.stack([x.float() for x in largest]).isfinite().all())


def is_bound(t: Tensor) -> bool:
    """Returns whether a tensor is one infinite number, which is no sign of a run that diverged.

    timm's Gemma 4 keeps the limits of its clamps as buffers (): infinity until they are measured.
    """
    return t.dim() == 0 and t.is_floating_point() and bool(t.isinf())


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ConfigError, naming a tensor, if weights are NaN or infinite.

    what: the file, for the message. Scalars may be infinite: see `is_bound`.
    """
    wrong = [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and not t.isfinite().all() and not is_bound(t)
    ]
    if wrong:
        others = f" and {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{what}: {wrong[0]}{others} hold NaN or infinity, so the run had diverged; "
            "take an earlier checkpoint, or train again with a lower --optim.lr"
        )
