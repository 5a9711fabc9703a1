"""Which run is continued, whether it is the same run, and the random states that make it so bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.train.checkpoint import load_checkpoint

# Options that may differ between the parts of one run: they change neither the model nor the stream of batches.
FREE_TO_CHANGE = (
    "data.path",
    "data.workers",
    "data.loader",
    "train.device",
    "train.max_steps",
    "train.dir",
    "train.log_every",
    "engine.",
    "checkpoint.",
    "knn.",
)


def configure(recipe: str | None, resume: str, options: Mapping[str, Any]) -> Config:
    """The configuration of a run, from the command line's RECIPE, --resume and --group.option values.

    Without a recipe, a run that is continued says itself what it is; else the default recipe counts. A run that is
    continued from its own folder stays there.
    """
    place = options.get("train.dir", "") if resume == "auto" else resume
    if recipe:
        config = settings.load_recipe(recipe)
    elif place and (resume != "auto" or (Path(place) / "checkpoints").is_dir()):
        config = settings.from_dict(load_checkpoint(place)["config"])
    else:
        config = settings.load_recipe(settings.DEFAULT_RECIPE)
    if place and resume != "auto":
        path = Path(place)
        if path.is_dir():
            config.train.dir = str(path)
        elif path.parent.name == "checkpoints":
            config.train.dir = str(path.parent.parent)
    settings.apply(config, options)
    settings.validate(config)
    return config


def find_checkpoint(folder: Path, resume: str) -> dict[str, Any] | None:
    """The checkpoint to continue from: of `folder` for "auto" (None where it has none), else the one at `resume`."""
    if resume != "auto":
        return load_checkpoint(resume) if resume else None
    try:
        return load_checkpoint(folder)
    except FileNotFoundError:
        return None


def check_same_run(config: Config, state: dict[str, Any]) -> None:
    """ConfigError where `config` would make another run of the checkpoint's; names the first such option."""
    now, then = settings.to_dict(config), state["config"]
    for group in settings.groups():
        for key, value in now[group].items():
            name = f"{group}.{key}"
            if not name.startswith(FREE_TO_CHANGE) and value != then[group].get(key, value):
                raise ConfigError(
                    f"{name}: {value!r}, but the run to continue has {then[group][key]!r}; start a new run "
                    "(another --train.dir, no --resume) to change it"
                )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators of this process. The data need none: they are a function of seed, epoch and step."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Continues torch's generators from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
