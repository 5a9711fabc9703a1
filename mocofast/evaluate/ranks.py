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
from mocofast.errors import NothingDecodedError


def over_ranks(
    compute: Callable[[Source], tuple[Tensor, ...]], source: Source
) -> tuple[Tensor, ...]:
    """Returns compute(source), of which every rank computes consecutive images.

    compute: returns tensors on the CPU with a row for every image. An image's row does not depend
        on other images.
    The order of the rows is that of one process. Raises an error of one rank on all ranks. A rank
    without a readable image has no rows, and only no readable image at all is an error.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1 or len(source) < world_size:
        return compute(source)
    bounds = np.linspace(0, len(source), world_size + 1).astype(np.int64)
    part = Subset(source, np.arange(bounds[rank], bounds[rank + 1]))
    found: tuple[Tensor, ...] | None = None
    problem = nothing = ""
    try:
        found = compute(part)
    except NothingDecodedError as error:
        nothing = str(error)
    except ValueError as error:
        problem = str(error)
    parts = gather_objects((found, problem, nothing))
    for _, text, _ in parts:
        if text:
            raise ConfigError(text)
    rows = [tensors for tensors, _, _ in parts if tensors is not None]
    if not rows:
        raise NothingDecodedError(parts[0][2])
    return tuple(torch.cat(tensors) for tensors in zip(*rows))
