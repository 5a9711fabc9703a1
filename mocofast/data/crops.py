"""Makes the views of a batch from decoded images, or from crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mocofast.config import AugmentConfig
from mocofast.data.interface import ViewParams
from mocofast.data.photometric import compiled, make_views
from mocofast.data.resize import resized_crops
from mocofast.data.view_ops import only_moves

# Pixels of the views that are made in one call. With PyTorch's operators the dozen float planes of
# the call should stay in the L2 cache of a CPU: 40 views of 224 pixels take twice as long per view
# as 1 view. The compiled operators make one view after the other, and calls from Python take 40 us.
# On a GPU more pixels spread the cost of kernel launches.
CHUNK_PIXELS = {"operators": 224 * 224, "compiled": 8 * 224 * 224, "cuda": 128 * 224 * 224}
# A call with fewer pixels takes less time than it takes to wake a thread for it.
LEAST_PIXELS = 224 * 224


def make_from_images(
    images: Sequence[Tensor], params: Sequence[ViewParams], augment: AugmentConfig, out: Tensor
) -> None:
    """Crops, resizes and augments n images on the CPU.

    images: (H, W, C), uint8 or uint16.
    params: the parameters of n views.
    out: (n, H, W, C) of the same type, in C order.
    """
    boxes = [(p.top, p.left, p.height, p.width) for p in params]
    if not all(map(only_moves, params)):
        resized_crops(images, boxes, out)
        make_views(out, params, augment, out)
        return
    resized_crops(images, boxes, out, [(p.flip, p.vertical_flip) for p in params])
    for view, p in zip(out.numpy(), params):
        if p.turns:
            view[:] = np.rot90(view, p.turns).copy()


def views_from_images(
    images: Sequence[Tensor],
    params: Sequence[ViewParams],
    augment: AugmentConfig,
    pool: ThreadPoolExecutor,
    threads: int,
) -> tuple[Tensor, list[Future[None]]]:
    """Starts to crop, to resize and to augment images on the CPU.

    images: B images, (H, W, C), uint8 or uint16.
    params: the parameters of B views.
    pool: the threads, whose operators use one core each (`compute_alone`).
    threads: their number.

    Returns views (B, C, H, W), channels-last, and calls that must have ended before the views are
    read.
    """
    height, width = augment.shape
    first = images[0]
    views = first.new_empty((len(images), height, width, first.shape[2]), device="cpu")
    most = CHUNK_PIXELS["operators" if compiled()[0] is None else "compiled"]
    # At least two calls for every thread: none waits long for the last call.
    chunk = max(LEAST_PIXELS // (height * width), len(images) // (2 * threads))
    chunk = max(1, min(most // (height * width), chunk))

    def work(start: int) -> None:
        part = slice(start, start + chunk)
        make_from_images(images[part], params[part], augment, views[part])

    if len(images) * height * width < LEAST_PIXELS:
        work(0)
        return views.permute(0, 3, 1, 2), []
    calls = [pool.submit(work, start) for start in range(0, len(images), chunk)]
    return views.permute(0, 3, 1, 2), calls


def views_from_crops(crops: Tensor, params: Sequence[ViewParams], augment: AugmentConfig) -> Tensor:
    """Augments crops (B, H, W, C) on a GPU. Returns views (B, C, H, W), channels-last,
    in new memory.
    """
    views = torch.empty_like(crops)
    chunk = max(1, CHUNK_PIXELS["cuda"] // math.prod(augment.shape))
    for start in range(0, len(crops), chunk):
        part = slice(start, start + chunk)
        make_views(crops[part], params[part], augment, views[part])
    return views.permute(0, 3, 1, 2)
