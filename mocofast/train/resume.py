"""Finds the run to continue, and checks that the configuration continues the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.optim.schedule import cooldown_start
from mocofast.train.checkpoint import LAST, load_checkpoint

# Options that may change in a continued run: they change neither the model nor the data stream.
FREE_TO_CHANGE = (
    "data.path",
    "data.workers",
    "data.loader",
    "data.prefetch",
    "data.hw_decoder_load",
    "data.preallocate",
    "train.device",
    "train.max_steps",
    "train.dir",
    "train.log_every",
    "engine.",
    "checkpoint.",
    "knn.",
)


def configure(
    recipe: str | None, resume: str, options: Mapping[str, Any], cooldown: int = 0
) -> Config:
    """Returns the configuration of a run.

    recipe: RECIPE of the command line. None takes the configuration of the run to continue, or the
        default recipe for a new run.
    resume: the value of --resume. A run that is continued from its own folder stays there.
    options: the values of --group.option.
    cooldown: the value of --cooldown: epochs of a branch (see `_branch`). 0: no branch.
    """
    if cooldown:
        return _branch(recipe, resume, options, cooldown)
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


def _branch(recipe: str | None, resume: str, options: Mapping[str, Any], cooldown: int) -> Config:
    """Returns the configuration of a branch of a run: a decay of the rate to 0, and the end.

    The branch starts at the checkpoint, and decays over `cooldown` epochs after the checkpoint's
    epoch. Its folder stands beside the run's folder, which stays as it is.
    """
    if cooldown < 1:
        raise ConfigError(f"--cooldown: expected at least 1 epoch, got {cooldown}")
    if recipe or resume in ("", "auto"):
        raise ConfigError(
            "--cooldown branches from a run: expected --resume RUN or a checkpoint of a run, "
            "without a recipe"
        )
    for name in {"train.epochs", "optim.schedule", "optim.cooldown_epochs"} & options.keys():
        raise ConfigError(f"{name}: --cooldown sets this option; leave it out")
    state = load_checkpoint(resume)
    trunk = configure(None, resume, {})
    if trunk.optim.schedule != "wsd":
        raise ConfigError(
            "--cooldown: expected a run with optim.schedule wsd, whose rate stays at its peak; "
            f"{resume} has {trunk.optim.schedule}"
        )
    if getattr(trunk.model, "momentum_schedule", "constant") != "constant":
        raise ConfigError(
            "--cooldown: expected a run with model.momentum_schedule constant; another schedule "
            "depends on the length of the run"
        )
    epoch = state["epoch"] + (state["step_in_epoch"] > 0)
    folder = Path(trunk.train.dir)
    branch = {
        "train.epochs": epoch + cooldown,
        "train.dir": str(folder.with_name(f"{folder.name}-epoch{epoch}-cooldown{cooldown}")),
        "train.max_steps": 0,
        "knn.patience": 0,  # a plateau may be what ended the run
        "optim.cooldown_epochs": float(cooldown),
        **options,
    }
    settings.apply(trunk, branch)
    settings.validate(trunk)
    if (Path(trunk.train.dir) / "checkpoints" / LAST).exists():
        raise ConfigError(
            f"train.dir: {trunk.train.dir} holds a run already. --resume {trunk.train.dir} "
            "without --cooldown continues this run, another --train.dir starts a new branch"
        )
    return trunk


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


# Options that may also change where a run is extended.
FREE_TO_EXTEND = ("optim.", "train.epochs")


def _before_cooldown(config: Config, state: Mapping[str, Any]) -> bool:
    """Returns True where the steps until the checkpoint do not depend on the length of the run."""
    done = state["epoch"] + (state["step_in_epoch"] > 0)
    return (
        config.optim.schedule == "wsd"
        and getattr(config.model, "momentum_schedule", "constant") == "constant"
        and done <= cooldown_start(config.optim, config.train.epochs)
    )


def check_same_run(config: Config, state: dict[str, Any], extend: bool = False) -> None:
    """Raises ConfigError, naming the option, if `config` differs from the checkpoint's run.

    extend: options of FREE_TO_EXTEND may differ.
    """
    now, then = settings.to_dict(config), state["config"]
    free: tuple[str, ...] = FREE_TO_CHANGE
    if extend:
        free += FREE_TO_EXTEND
    if _before_cooldown(config, state) and _before_cooldown(settings.from_dict(then), state):
        free += ("train.epochs", "optim.cooldown_epochs")
    for group in settings.groups(config.model.method):
        for key, value in now[group].items():
            name = f"{group}.{key}"
            if not name.startswith(free) and value != then[group].get(key, value):
                may_extend = name.startswith(FREE_TO_EXTEND)
                raise ConfigError(
                    f"{name}: {value!r}, but the run to continue has {then[group][key]!r}. "
                    + ("--extend continues with the new value. " * may_extend)
                    + "To change this option, start a new run (another --train.dir, no --resume)"
                )
