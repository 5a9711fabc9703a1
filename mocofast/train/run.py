"""Pretraining: one code path for a CPU, a GPU, and many processes under torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import torch

from mocofast import distributed
from mocofast.config import Config
from mocofast.device import choose_device, same_bits
from mocofast.methods.base import Method
from mocofast.train.checkpoint import has_checkpoint
from mocofast.train.claim import claim_on_rank_0
from mocofast.train.evidence import GoBack
from mocofast.train.heartbeat import Heartbeat, stop_launcher
from mocofast.train.interrupt import StopRequest
from mocofast.train.loop import Run
from mocofast.train.result import Result as Result


def train(
    config: Config,
    resume: str = "",
    profile: bool = False,
    kept: Collection[str] | None = None,
    *,
    initialise: Callable[[Method], list[str]] | None = None,
    extend: bool = False,
) -> Result:
    """Runs a configuration from its start, or from a checkpoint.

    config: for example `mocofast.settings.load_recipe("digits")`.
    resume: "" for a new run, "auto" for the newest checkpoint of the run folder (a new run if there
        is none), or the path of a checkpoint or run folder.
    profile: rank 0 also times a few steps and writes mocofast.train.profile.FILES into the run
        folder. The results of the run stay the same.
    kept: None trains the configuration as it is. Otherwise a new run fits options to the images
        and the machine, as recipe `auto` says, all but the options named here.
    initialise: gives the method of a new run its first weights, and returns lines for the log (see
        mocofast.interop.initial). A continued run has its own weights.
    extend: a continued run may have other options of `optim`, other `train.epochs`, and as many
        images as before or more.
    Raises ConfigError for a configuration that cannot be used, and DivergedError if the loss or a
    weight is no finite number. The last finite checkpoint then stays.
    """
    device = choose_device(config.train.device)
    rank, world_size, local_rank = distributed.init_from_environment(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    try:
        with StopRequest() as stop, contextlib.ExitStack() as held:
            heart = held.enter_context(Heartbeat(config.train.hang_after))
            folder = claim_on_rank_0(held, config, bool(resume), rank)
            held.enter_context(same_bits(config.train.deterministic))
            left_out: tuple[int, ...] = ()
            result = None
            while result is None:
                options = (profile, kept, initialise, extend, heart)
                with heart.patient("the start"):
                    run = Run(config, resume, folder, device, rank, world_size, *options)
                run.state.left_out = tuple(sorted({*run.state.left_out, *left_out}))
                try:
                    with stop.after_steps():
                        result = run.train(stop)
                except GoBack as back:
                    left_out = tuple(sorted({*run.state.left_out, *back.steps}))
                    kept = None  # the options are fitted
                    resume = str(folder) if has_checkpoint(folder) else resume
                finally:
                    del run  # DistributedDataParallel must not outlive the process group
    finally:
        distributed.shutdown()
    if result.interrupted:
        stop_launcher()
    return result
