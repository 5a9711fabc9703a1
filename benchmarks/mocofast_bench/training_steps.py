"""Builds the training steps of `mocofast bench step`.

Every side builds a model from the same seed and returns a function for a single step.
Images are on the device already, in the format of the side's loader: uint8 for our step,
which normalises images, and normalised float32 for the rest.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mocofast.config import Config
from mocofast.device import choose_autocast, run_autocast
from mocofast.methods.moco import MoCo, build
from mocofast.models.pixels import prepare_images
from mocofast.train.engine import Engine, choose_mode
from mocofast.train.optimizer import optimizer_of
from mocofast_bench.reference_loop import (
    ReferenceMoCo,
    StrongMoCo,
    plain_sgd,
    reference_step,
    strong_step,
)
from mocofast_bench.timing import Call


def fresh_model(config: Config, device: torch.device) -> MoCo:
    """Returns the model of a configuration: weights from seed 0, channels-last as in training."""
    torch.manual_seed(0)
    model = build(config).to(device)
    # torch's stubs lack memory_format.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def channels_first(model: MoCo) -> MoCo:
    """Moves the model to the reference's memory layout (NCHW)."""
    # torch's stubs lack memory_format.
    return model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def pixel_views(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns two batches of noise, (B, 3, H, W) uint8, channels-last as from our loaders.

    A step on noise takes as long as a step on photos.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (config.data.batch_size, *config.augment.shape, 3)
    im_q, im_k = (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        for _ in range(2)
    )
    return im_q.permute(0, 3, 1, 2), im_k.permute(0, 3, 1, 2)


def float_views(
    model: MoCo, views: tuple[Tensor, Tensor], layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Returns the images normalised, (B, 3, S, S) float32, as from a plain DataLoader."""
    im_q, im_k = (normalise_images(model, view).contiguous(memory_format=layout) for view in views)
    return im_q, im_k


def normalise_images(model: MoCo, images: Tensor) -> Tensor:
    """Converts uint8 images to the input format of our model's encoders."""
    assert model.pixel_mean is not None and model.pixel_std is not None
    return prepare_images(images, model.pixel_mean, model.pixel_std)


def our_engine(
    config: Config, device: torch.device, mode: str | None = None, precision: str | None = None
) -> Engine:
    """Returns the engine of training.

    mode: engine mode. None: the mode of the configuration.
    precision: value of `train.precision`. None: the value of the configuration.

    Raises ConfigError for a mode without support on this device.
    """
    mode, _ = choose_mode(mode or config.engine.mode, device, world_size=1)
    model = fresh_model(config, device)
    model.to_fastest_format(device, getattr(config.model, "bn_splits", 1))
    if precision is None:
        autocast = run_autocast(config, model.encoder_q, device)
    else:
        autocast = choose_autocast(precision, device)
    micro_batches = config.train.accumulate
    return Engine(
        mode,
        model,
        optimizer_of(model, config.optim),
        autocast,
        micro_batches,
        config.data.batch_size // micro_batches,
    )


def mocofast(
    config: Config, device: torch.device, mode: str | None = None, precision: str | None = None
) -> Call:
    """Returns our step. mode, precision: as in `our_engine`."""
    engine, views = our_engine(config, device, mode, precision), pixel_views(config, device)
    return lambda: engine.step(views)


def reference(config: Config, device: torch.device) -> Call:
    """Returns the reference's step, in float32 and in the NCHW layout."""
    model = channels_first(fresh_model(config, device))
    views = float_views(model, pixel_views(config, device), torch.contiguous_format)
    plain = ReferenceMoCo(model)
    optimizer = plain_sgd(plain.parameters(), config.optim)
    return lambda: reference_step(plain, views, optimizer)


def strong(config: Config, device: torch.device) -> Call:
    """Returns a step of well-written plain PyTorch.

    Autocast where our step uses autocast, channels-last, grouped (foreach) updates.
    """
    model = fresh_model(config, device)
    views = float_views(model, pixel_views(config, device), torch.channels_last)
    eager = StrongMoCo(model)
    optimizer = plain_sgd(eager.parameters(), config.optim, foreach=True)
    autocast = run_autocast(config, model.encoder_q, device)
    return lambda: strong_step(eager, views, optimizer, autocast)


def lightly_step(config: Config, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a step made of lightly's blocks, as lightly's MoCo example combines them.

    The step takes two batches of normalised images, (B, 3, S, S) float32, channels-last, and
    returns the loss, (). Precision and layout are as in `strong`.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

    model = fresh_model(config, device)
    query, key = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    criterion = NTXentLoss(
        config.model.temperature, (config.model.queue_size, config.model.dim)
    ).to(device)
    optimizer = plain_sgd(query.parameters(), config.optim, foreach=True)
    autocast = run_autocast(config, model.encoder_q, device)

    def step(im_q: Tensor, im_k: Tensor) -> Tensor:
        update_momentum(query, key, config.model.momentum)
        with autocast:
            q = query(im_q)
            with torch.no_grad():
                images, order = batch_shuffle(im_k)
                k = batch_unshuffle(key(images), order)
            loss = criterion(q, k)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def lightly(config: Config, device: torch.device) -> Call:
    """Returns `lightly_step` on images that are on the device already."""
    step = lightly_step(config, device)
    model = fresh_model(config, device)
    views = float_views(model, pixel_views(config, device), torch.channels_last)
    return lambda: step(*views)


MODES = ("eager", "compile", "graph")
IN_FLOAT32 = "mocofast fp32"
STEPS: dict[str, Callable[[Config, torch.device], Call]] = {
    "mocofast": mocofast,
    IN_FLOAT32: functools.partial(mocofast, precision="fp32"),
    **{f"engine {mode}": functools.partial(mocofast, mode=mode) for mode in MODES},
    "reference": reference,
    "strong": strong,
    "lightly": lightly,
}


def encoders_only(config: Config, device: torch.device) -> Call:
    """Returns the floor of a step.

    Forward and backward pass of the query encoder, forward pass of the key encoder, nothing else.
    """
    model = fresh_model(config, device)
    model.to_fastest_format(device, getattr(config.model, "bn_splits", 1))
    autocast = run_autocast(config, model.encoder_q, device)
    with autocast:
        im_q, im_k = (normalise_images(model, view) for view in pixel_views(config, device))
    grad = torch.randn(len(im_q), config.model.dim, device=device)

    def step() -> None:
        model.encoder_q.zero_grad(set_to_none=True)
        with autocast:
            q = model.encoder_q(im_q)
            with torch.no_grad():
                model.encoder_k(im_k)
        q.backward(grad.to(q.dtype))

    return step
