"""Finds the run to continue, and checks that the configuration continues the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.optim.schedule import cooldown_start
from mocofast.train.checkpoint import check_entries, fitting, load_checkpoint

# Options that may change in a continued run: they change neither the model nor the data stream.
FREE_TO_CHANGE = (
    "data.path",
    "data.checksum",
    "data.workers",
    "data.loader",
    "data.prefetch",
    "data.hw_decoder_load",
    "data.preallocate",
    "train.device",
    "train.max_steps",
    "train.log_to",
    "train.dir",
    "train.deterministic",
    "train.skip_nonfinite",
    "train.hang_after",
    "train.log_every",
    "engine.",
    "checkpoint.",
    "knn.",
)


def find_checkpoint(folder: Path, resume: str, whole: bool = True) -> dict[str, Any] | None:
    """Loads the checkpoint to continue from.

    folder: the run folder, for resume="auto". Without a checkpoint there the result is None.
    resume: "auto", the path of a checkpoint or run folder, or "" for a new run.
    whole: False leaves sharded tensors in their files, until a sharded run reads its parts.
    """
    if resume != "auto":
        return load_checkpoint(resume, whole=whole) if resume else None
    try:
        return load_checkpoint(folder, whole=whole)
    except FileNotFoundError:
        return None


# Options that may also change where a run is extended.
FREE_TO_EXTEND = (
    "optim.",
    "train.epochs",
    *("data.source", "data.train", "data.val", "data.include", "data.exclude"),
    *("data.labels", "data.group", "data.holdout"),
)


def _before_cooldown(config: Config, state: Mapping[str, Any]) -> bool:
    """Returns True where the steps until the checkpoint do not depend on the length of the run."""
    return (
        config.optim.schedule == "wsd"
        and getattr(config.model, "momentum_schedule", "constant") == "constant"
        and _begun(state) <= cooldown_start(config.optim, config.train.epochs)
    )


def _begun(state: Mapping[str, Any]) -> int:
    """Returns the number of epochs that the run of a checkpoint has begun."""
    begun: int = state["epoch"] + (state["step_in_epoch"] > 0)
    return begun


def check_same_run(config: Config, state: dict[str, Any], extend: bool = False) -> None:
    """Raises ConfigError, naming the option, if `config` differs from the checkpoint's run.

    extend: options of FREE_TO_EXTEND may differ, apart from the optimiser's name. The run may not
        get shorter.

    (`train.precision` may be auto, see `keep_precision`.)
    """
    check_entries(state, to_continue=True)
    now, then = settings.to_dict(config), state["config"]
    with fitting():
        settings.from_dict(then)
    if extend and config.train.epochs < _begun(state):
        raise ConfigError(
            f"train.epochs: {config.train.epochs}, but the run to continue is in epoch "
            f"{_begun(state)} already. --extend takes the length of the whole run: "
            f"{_begun(state) + config.train.epochs} for {config.train.epochs} more"
        )
    free: tuple[str, ...] = FREE_TO_CHANGE
    if _before_cooldown(config, state) and _before_cooldown(settings.from_dict(then), state):
        free += ("train.epochs", "optim.cooldown_epochs")
    for group in settings.groups(config.model.method):
        for key, value in now[group].items():
            name = f"{group}.{key}"
            if (name, value) == ("train.precision", "auto"):
                continue
            may_extend = name.startswith(FREE_TO_EXTEND) and name != "optim.name"  # states differ
            is_free = name.startswith(free) or (extend and may_extend)
            if not is_free and value != then.get(group, {}).get(key, value):
                raise ConfigError(
                    f"{name}: {value!r}, but the run to continue has {then[group][key]!r}. "
                    + ("--extend continues with the new value. " * may_extend)
                    + "To change this option, start a new run (another --train.dir, no --resume)"
                )


def keep_precision(config: Config, state: dict[str, Any], device: torch.device) -> None:
    """Sets `train.precision` auto to the precision of the checkpoint's run.

    auto stays where the run had it, too, but on a CPU for a run that computed in fp32: an earlier
    version, or another CPU, took fp32 where this CPU takes bf16.
    """
    if config.train.precision != "auto":
        return
    then: str = state["config"]["train"].get("precision", "auto")
    # Earlier checkpoints name no precision, and auto was fp32 on CPUs.
    if then == "auto" and device.type == "cpu" and state.get("precision", "fp32") == "fp32":
        then = "fp32"
    config.train.precision = then
