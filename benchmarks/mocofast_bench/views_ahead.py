"""Views of several epochs of digits, made together, beside those of the device loader.

The device loader makes the views of up to SAMPLED_AT_ONCE at a time: of digits, a whole epoch. Only
views of more than one epoch could still be made ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocofast.config import Config
from mocofast.data.device_loader import DeviceLoader, compose
from mocofast.data.interface import BatchSlice, source_order, view_augments
from mocofast.data.sampling import sample_views
from mocofast.data.sources import ArraySource, load_datasets
from mocofast_bench.training_steps import our_engine

CPU = torch.device("cpu")


class Sides(NamedTuple):
    """What is timed."""

    epoch: Callable[[], None]  # the steps of an epoch, with their views, as `pretrain` makes them
    views: Callable[[], None]  # the views of an epoch, as the loader makes them
    ahead: Callable[[], list[Tensor]]  # the views of `epochs` epochs: (N, H, W, C) per view


def build_sides(config: Config, epochs: int) -> Sides:
    """Returns what is timed. config: a run on arrays in memory, such as digits.

    epochs: whose views are made together.
    """
    source = load_datasets(config.data).train
    assert isinstance(source, ArraySource)
    augments = view_augments(config.augment, 2)
    batches = BatchSlice(config.data.batch_size)
    loader = DeviceLoader(source, augments, batches, config.train.seed, CPU)
    engine, numbers = our_engine(config, CPU), itertools.count()

    def train() -> None:
        for batch in loader.epoch(next(numbers)):
            engine.step(batch.views)

    def make() -> None:
        for _ in loader.epoch(next(numbers)):
            pass

    def make_ahead() -> list[Tensor]:
        orders = (source_order(source, config.train.seed, epoch) for epoch in range(epochs))
        steps = range(loader.steps_per_epoch)
        index = np.concatenate([batches.indices(order, n) for order in orders for n in steps])
        images, chosen = torch.from_numpy(source.images), torch.from_numpy(index)
        size = np.array(source.images.shape[1:3])
        # The parameters of all epochs in one call: as of epoch 0, which costs as much.
        return [
            compose(
                *(images, chosen),
                sample_views(augment, size, config.train.seed, 0, index, view),
                augment,
            )
            for view, augment in enumerate(augments)
        ]

    return Sides(train, make, make_ahead)
