"""Finds the run to continue, and checks that the configuration continues the same run."""

from __future__ import annotations

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
