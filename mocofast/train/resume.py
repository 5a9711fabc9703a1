"""Finds the run to continue, and checks that the configuration continues the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.train.checkpoint import load_checkpoint

# Options that may change in a continued run: they change neither the model nor the data stream.
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
    """Returns the configuration of a run.

    recipe: RECIPE of the command line. None takes the configuration of the run to continue, or the
        default recipe for a new run.
    resume: the value of --resume. A run that is continued from its own folder stays there.
    options: the values of --group.option.
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
    """Loads the checkpoint to continue from.

    folder: the run folder, for resume="auto". Without a checkpoint there the result is None.
    resume: "auto", the path of a checkpoint or run folder, or "" for a new run.
    """
    if resume != "auto":
        return load_checkpoint(resume) if resume else None
    try:
        return load_checkpoint(folder)
    except FileNotFoundError:
        return None


def check_same_run(config: Config, state: dict[str, Any]) -> None:
    """Raises ConfigError, naming the option, if `config` differs from the checkpoint's run."""
    now, then = settings.to_dict(config), state["config"]
    for group in settings.groups(config.model.method):
        for key, value in now[group].items():
            name = f"{group}.{key}"
            if not name.startswith(FREE_TO_CHANGE) and value != then[group].get(key, value):
                raise ConfigError(
                    f"{name}: {value!r}, but the run to continue has {then[group][key]!r}. "
                    "To change this option, start a new run (another --train.dir, no --resume)"
                )
