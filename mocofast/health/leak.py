"""Does BatchNorm betray the positive? Pretext accuracy with and without shuffled keys."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mocofast.methods.base import Method
from mocofast.models.batch_norm import SplitBatchNorm


@torch.no_grad()
def leak_test(method: Method, views: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns acc1_as_trained and acc1_shuffled, () float32 each. {}: there is nothing to test.

    method: has a queue, and BatchNorm over splits of the batch. Stays as it is. Waits for nothing.
    views: two views of the same images, (N, C, S, S).

    A query and its key share a split if the run does not shuffle keys, so the statistics of the
    split can tell the key. Shuffled, a split's keys come from all splits.
    """
    queue = getattr(method, "queue", None)
    norms = [m for m in method.encoder_q.modules() if isinstance(m, SplitBatchNorm)]
    splits = norms[0].num_splits if norms else 1
    if not isinstance(queue, Tensor) or splits < 2 or len(views) < 2 or len(views[0]) % splits:
        return {}
    # Copies in train mode: the run's own statistics stay as they are.
    query, key = (copy.deepcopy(getattr(method, name)) for name in ("encoder_q", "encoder_k"))
    query.train()
    key.train()
    images = [method.normalize_pixels(view) for view in views[:2]]
    count = len(images[0])
    # Split n % splits of the batch gets images of all splits.
    order = torch.arange(count, device=queue.device).view(splits, -1).T.flatten()
    back = order.argsort()
    q = F.normalize(query(images[0]).float(), dim=1)
    found: dict[str, Tensor] = {}
    for name, keys in (
        ("acc1_as_trained", key(images[1])),
        ("acc1_shuffled", key(images[1][order])[back]),
    ):
        k = F.normalize(keys.float(), dim=1)
        positive, negatives = (q * k).sum(1), (q @ queue.float().T).amax(1)
        found[name] = (positive > negatives).float().mean()
    return found
