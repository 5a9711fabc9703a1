"""Evaluation on many ranks: each computes a part of the images, and all get the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.data.interface import Source
from mocofast.data.sources import Subset
from mocofast.distributed import gather_objects, rank_and_world_size


def over_ranks(
    compute: Callable[[Source], tuple[Tensor, ...]], source: Source
) -> tuple[Tensor, ...]:
    """Returns compute(source), of which every rank computes consecutive images.

    compute: returns tensors on the CPU with a row for every image. An image's row does not depend
        on other images.
    The order of the rows is that of one process. Raises an error of one rank on all ranks.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1 or len(source) < world_size:
        return compute(source)
    bounds = np.linspace(0, len(source), world_size + 1).astype(np.int64)
    part = Subset(source, np.arange(bounds[rank], bounds[rank + 1]))
    found: tuple[Tensor, ...] | None = None
    problem = ""
    try:
        found = compute(part)
    except ValueError as error:
        problem = str(error)
    parts = gather_objects((found, problem))
    for _, text in parts:
        if text:
            raise ConfigError(text)
    return tuple(torch.cat(tensors) for tensors in zip(*(rows for rows, _ in parts)))
