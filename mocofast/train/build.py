"""Builds the parts of a run: datasets, model, optimiser, loader."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mocofast import distributed
from mocofast.config import Config, ConfigError
from mocofast.data.interface import BatchSlice, Loader, view_augments
from mocofast.data.loaders import build_loader
from mocofast.data.sources import Datasets, labelled, load_datasets
from mocofast.device import run_autocast, short_name, wrong_views
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.models.encoders import build_encoder, untrained
from mocofast.models.recompute import recompute_blocks
from mocofast.rendezvous import wait_for
from mocofast.train.checkpoint import RunState
from mocofast.train.checks import check_batches
from mocofast.train.estimate import fitting_queue
from mocofast.train.metrics import Window
from mocofast.train.optimizer import optimizer_of
from mocofast.train.sharding import Sharding, check_shardable, is_sharded
from mocofast.view_sizes import pixels_text


def load_on_rank_0_first(config: Config, rank: int) -> Datasets:
    """Loads the datasets. The other ranks wait, because rank 0 may have to download the images."""
    store = distributed.own_store()
    if rank and store is not None:
        wait_for(store, "rank 0 has loaded")  # a download may take longer than a collective waits
    try:
        return load_datasets(config.data, config.train.seed, config.model.takes_captions)
    finally:
        if rank == 0 and store is not None:
            store.set("rank 0 has loaded", "")


def new_state(
    config: Config,
    datasets: Datasets,
    device: torch.device,
    rank: int,
    world_size: int,
    restored: bool = False,
) -> RunState:
    """Builds model, optimiser and loader of a run from its start.

    restored: the weights of a checkpoint follow.
    """
    if device.type == "cuda":
        # Almost every batch has the same shape. The fastest algorithm differs between runs.
        torch.backends.cudnn.benchmark = not config.train.deterministic
    torch.manual_seed(config.train.seed)
    source = datasets.train
    for size in config.augment.training_sizes():
        build_encoder(config.model.arch, size, config.data.channels)  # refuses parts of patches
    first = untrained(config) if restored else config
    model = build_method(first, len(source), len(source.classes))
    parts: int = getattr(config.model, "bn_splits", 1)
    sharded = is_sharded(config, world_size)
    if not sharded:
        model.to_fastest_format(device, math.ceil(parts / world_size))
    if "labels" in model.batch_fields:
        source = labelled(source)
    batch_slice = BatchSlice(
        config.data.batch_size,
        rank,
        world_size,
        config.data.drop_last,
        uneven=True,
        parts=parts,
    )
    loader: Loader = build_loader(
        source,
        config.data,
        view_augments(config.augment, model.num_views),
        batch_slice,
        config.train.seed,
        device,
    )
    _drop_tokens(model, config)
    check_batches(config, model.encoder_q, len(source), batch_slice)
    if config.engine.checkpoint_activations and not recompute_blocks(model.encoder_q):
        raise ConfigError(
            "engine.checkpoint_activations: expected false, because model.arch "
            f"{config.model.arch} has no blocks"
        )
    sharding = None
    if sharded:  # from the CPU, so that no device holds the whole model
        autocast = run_autocast(config, model.encoder_q, device)
        check_shardable(config, model, autocast)
        sharding = Sharding(model, device, autocast)
    optimizer = optimizer_of(model, config.optim)
    window = Window(device)
    of_run = (config, model, optimizer, loader, source, window, device, batch_slice)
    return RunState(*of_run, sharding=sharding)


def _drop_tokens(model: nn.Module, config: Config) -> None:
    """Turns token dropout on in all ViTs of a method, if it is asked for."""
    share = config.model.token_dropout
    if not share:
        return
    from mocofast.models.flexible_vit import FlexibleViT

    vits = [module for module in model.modules() if isinstance(module, FlexibleViT)]
    if not vits:
        raise ConfigError(
            "model.token_dropout: expected 0, because only ViTs of model.arch (vit_*) have tokens, "
            f"and {config.model.arch} is no such ViT"
        )
    for number, vit in enumerate(vits):
        vit.drop_tokens(share, 1000003 * config.train.seed + number)


def queue_remarks(method: Method, images: int, batch: int) -> list[str]:
    """Returns a line about a queue of more keys than images, whose keys are of many epochs.

    images: number in the training set. batch: images in a step.
    """
    keys = len(queue) if isinstance(queue := getattr(method, "queue", None), Tensor) else 0
    if keys <= images:
        return []
    return [
        f"the queue of {keys} keys is larger than the set of {images} images, and holds the keys "
        f"of {keys / images:.3g} epochs: an image meets its own old keys as negatives. Prefer a "
        f"queue smaller than the set, --model.queue_size {fitting_queue(images, batch)} for example"
    ]


def check_gradients(autocast: torch.autocast, encoder: nn.Module, config: Config) -> None:
    """Raises ConfigError if a CPU gets a convolution of the encoder wrong in bf16.

    config: gives the sizes of the views.
    """
    if autocast.device != "cpu" or short_name(autocast) != "bf16":
        return
    if wrong := wrong_views(config, encoder):
        name, size = wrong
        raise ConfigError(
            f"train.precision: a CPU computes a wrong result or gradient of {name} in bf16 at "
            f"augment.size {pixels_text(size)}; take fp32, or larger views"
        )
