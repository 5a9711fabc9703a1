"""Checks of a run before its first step: batches that BatchNorm or splits cannot take."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mocofast.config import Config, ConfigError
from mocofast.data.interface import BatchSlice
from mocofast.view_sizes import height_width


def micro_batches(config: Config, images: int, batch_slice: BatchSlice) -> dict[str, int]:
    """Returns the number of images of the smallest micro-batch on a rank, {option: number}.

    images: in the training set. The keys are the options that make the micro-batch smaller.
    Raises ConfigError where a batch cannot be divided into parts of BatchNorm.
    """
    whole, rest = images // config.data.batch_size, images % config.data.batch_size
    steps = {"data.batch_size": 0} if whole else {}
    if not config.data.drop_last and rest and batch_slice.steps(images) > whole:
        steps["data.drop_last"] = whole
    found = {}
    for option, step in steps.items():
        try:
            parts = batch_slice.shares(images, step).micro_batches(config.train.accumulate)
        except ConfigError as error:
            ways = _WAYS[option]
            raise ConfigError(f"{error}{ways}") from None
        found[option] = min(count for part in parts for count in part.counts)
    return found


_WAYS = {"data.batch_size": "", "data.drop_last": "; --data.drop_last true leaves the batch out"}


def check_batches(config: Config, encoder: nn.Module, images: int, batch_slice: BatchSlice) -> None:
    """Raises ConfigError, naming the option, for micro-batches that cannot be trained on.

    encoder: in train mode. images: in the training set.
    """
    splits = batch_slice.parts
    for option, count in micro_batches(config, images, batch_slice).items():
        what = "a micro-batch" if option == "data.batch_size" else "the last batch of an epoch"
        alone = count == splits and batch_slice.world_size == 1
        if alone and (layer := _needs_two(config, encoder, splits)):
            of = f" in each of {splits} splits (model.bn_splits)" if splits > 1 else ""
            raise ConfigError(
                f"{option}: {what} has 1 image{of}, and BatchNorm {layer} needs 2 or more values a "
                f"channel{_WAYS[option]}"
            )


@torch.no_grad()
def _needs_two(config: Config, encoder: nn.Module, splits: int) -> str:
    """Returns the name of a BatchNorm that cannot train on one image a split, "" for none."""
    encoder = copy.deepcopy(encoder).train()
    seen: list[str] = []
    for name, module in encoder.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(
                lambda m, x, name=name: seen.append(name) if x[0][:, 0].numel() == splits else None
            )
    height, width = min(map(height_width, config.augment.training_sizes()), key=math.prod)
    device = next(encoder.parameters()).device
    state = torch.get_rng_state()
    try:
        encoder(torch.zeros(splits, config.data.channels, height, width, device=device))
    except ValueError:  # BatchNorm refuses a single value
        pass
    finally:
        torch.set_rng_state(state)
    return seen[0] if seen else ""
