"""Checks of a run before its first step: batches that BatchNorm or splits cannot take."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mocofast.config import Config, ConfigError
from mocofast.view_sizes import height_width


def micro_batches(config: Config, images: int, world_size: int) -> dict[str, int]:
    """Returns the number of images of the smallest micro-batch on a rank, {option: number}.

    images: in the training set. The keys are the options that make the micro-batch smaller.
    """
    batch, accumulate = config.data.batch_size, config.train.accumulate
    found = {"data.batch_size": _smallest_part(batch // world_size, accumulate)}
    rest = images % batch
    if not config.data.drop_last and rest >= world_size:
        found["data.drop_last"] = _smallest_part(rest // world_size, accumulate)
    return found


def _smallest_part(count: int, parts: int) -> int:
    """Returns the size of the smallest part that torch.chunk makes."""
    size = -(-count // parts)
    return count % size or size


def check_batches(config: Config, encoder: nn.Module, images: int, world_size: int) -> None:
    """Raises ConfigError, naming the option, for micro-batches that cannot be trained on.

    encoder: in train mode. images: in the training set.
    """
    splits = getattr(config.model, "bn_splits", 1)
    for option, count in micro_batches(config, images, world_size).items():
        ways = "" if option == "data.batch_size" else "; --data.drop_last true leaves it out"
        what = "a micro-batch" if option == "data.batch_size" else "the last batch of an epoch"
        if count % splits:
            raise ConfigError(
                f"model.bn_splits: {what} has {count} images on a rank ({option}), which are not "
                f"divisible by {splits} splits{ways}"
            )
        if count == splits and world_size == 1 and (layer := _needs_two(config, encoder, splits)):
            of = f" in each of {splits} splits (model.bn_splits)" if splits > 1 else ""
            raise ConfigError(
                f"{option}: {what} has 1 image{of}, and BatchNorm {layer} needs 2 or more values a "
                f"channel{ways}"
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
