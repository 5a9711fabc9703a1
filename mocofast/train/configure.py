"""What a command line means: the recipe, the images, and options that would have no effect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mocofast import settings
from mocofast.config import OWN_IMAGES, Config, ConfigError
from mocofast.data.label_share import asks_for_few
from mocofast.data.lists import ENDINGS
from mocofast.data.table_sets import holds_tables
from mocofast.data_config import TABLES
from mocofast.train.checkpoint import LAST, check_entries, fitting, load_checkpoint
from mocofast.train.places import check_places, run_folder_of
from mocofast.train.run_folder import choose_folder

AUTO = "auto"  # the recipe for images without a named recipe
_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def split_words(words: Sequence[str]) -> tuple[str | None, str]:
    """Returns the recipe, or None, and the place of the images, or "".

    words: the arguments without a name, a recipe and a place at most, in any order.
    Raises ConfigError for a word that is neither, with the way out.
    """
    recipe, place = None, ""
    for word in words:
        is_recipe = word in settings.recipes() or word.endswith((".yaml", ".yml"))
        if is_recipe and recipe is None:
            recipe = word
        elif not is_recipe and is_run_folder(word):
            raise ConfigError(
                f"{word!r} is a run folder, not a folder of images: mocofast pretrain --resume "
                f"{word} continues the run"
            )
        elif not is_recipe and _is_place(word) and not place:
            place = word
        elif is_recipe or _is_place(word):
            raise ConfigError(f"expected a recipe and a folder of images, got also {word!r}")
        elif "/" in word or word.startswith(("~", ".")):
            raise FileNotFoundError(f"data.path: there is no folder or file {word!r}")
        else:
            raise ConfigError(
                f"unknown recipe {word!r}{settings.nearest(word, settings.recipes())} (there are: "
                f"{', '.join(settings.recipes())}); and there is no folder of images of this name"
            )
    return recipe, place


def is_run_folder(place: str) -> bool:
    """Returns whether a place is the folder of a run."""
    folder = Path(place).expanduser()
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def _is_place(word: str) -> bool:
    return "{" in word or "://" in word or Path(word).expanduser().exists()


def source_of(place: str) -> str:
    """Returns the data.source that reads a place: folder, shards, parquet, list or zip."""
    path = Path(place).expanduser()
    if "{" in place or "://" in place or path.suffix == ".tar":
        return "shards"
    if path.exists() and holds_tables(path):
        return TABLES[0]
    if path.is_dir():
        folders = [path, *(path / name for name in ("train", "training"))]
        return "shards" if any(next(f.glob("*.tar"), None) for f in folders) else "folder"
    if path.suffix.lower() == ".zip":
        return "zip"
    return "list" if path.suffix.lower() in ENDINGS else "folder"


def configure(
    recipe: str | None,
    resume: str,
    options: Mapping[str, Any],
    images: str = "",
    cooldown: int = 0,
    *,
    check: bool = True,
) -> Config:
    """Returns the configuration of a run.

    recipe: RECIPE of the command line. None takes the configuration of the run to continue, or the
        recipe `auto` for images that are given, or the default recipe.
    resume: the value of --resume. A run that is continued from its own folder stays there.
    options: the values of --group.option.
    images: the folder of images that stands without a name on the command line, or "".
    cooldown: the value of --cooldown: epochs of a branch (see `_branch`). 0: no branch.
    check: raise ConfigError for an option without effect.
    """
    if cooldown:
        return _branch(recipe, resume, options, cooldown)
    options = dict(options)
    if images:
        given = options.setdefault("data.path", images)
        if given != images:
            raise ConfigError(f"data.path: both {images!r} and {given!r} are given")
    path = options.get("data.path", "")
    config, place = _base(recipe, resume, options)
    if place:
        config.train.dir = place
    if path and "data.source" not in options and (source := _source_for(config, path)):
        options["data.source"] = source
    before = settings.to_dict(config)
    if check:
        _check_owners(options, str(options.get("model.method", config.model.method)))
    settings.apply(config, options)
    if check:
        check_effects(config, options, before)
    settings.validate(config)
    return config


def kept_options(
    config: Config, recipe: str | None, options: Collection[str]
) -> Collection[str] | None:
    """Returns the options that `mocofast.train.run.train` keeps while it fits the others, or None.

    config: of `configure`. recipe, options: as given. None for a run that fits nothing: it has
    another recipe, or a config.yaml of an earlier run, which holds the choices already.
    """
    fits = config.recipe == AUTO and recipe in (None, AUTO)
    return options if fits else None


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


def _base(recipe: str | None, resume: str, options: Mapping[str, Any]) -> tuple[Config, str]:
    """Returns the configuration before the options, and the run folder to continue, or ""."""
    to_continue = options.get("train.dir", "") if resume == "auto" else resume
    automatic = recipe == AUTO or (recipe is None and "data.path" in options)
    if resume == "auto" and automatic and not to_continue:
        to_continue = str(choose_folder(Config(recipe=AUTO), True))
    if recipe and not (automatic and to_continue):
        config = settings.load_recipe(recipe)
    elif to_continue and (resume != "auto" or (Path(to_continue) / "checkpoints").is_dir()):
        state = load_checkpoint(to_continue)
        check_entries(state)
        with fitting():
            config = settings.from_dict(state["config"])
        if resume != "auto":
            check_places(config, to_continue, options, writes=True)
    else:
        config = settings.load_recipe(AUTO if automatic else settings.DEFAULT_RECIPE)
    if to_continue and resume != "auto":
        return config, str(run_folder_of(to_continue) or "")
    return config, ""


def _source_for(config: Config, path: str) -> str:
    """Returns the data.source for a path that is given, or "" to keep the recipe's."""
    source = config.data.source
    if source in _CIFAR:
        root = Path(path).expanduser()
        # A folder with other content than CIFAR's files is a folder of images.
        holds_cifar = (root / _CIFAR[source]).exists() or any(root.glob("cifar-*"))
        others = root.is_dir() and any(root.iterdir()) and not holds_cifar
        return source_of(path) if others or root.is_file() else ""
    return source_of(path) if source in ("folder", "digits") else ""


def _of_embedded(config: Config) -> str:
    source = config.data.source
    return f"with data.source={source}" if source in ("digits", *_CIFAR) else ""


# Options, and a function that returns why they have no effect, or "".
_EFFECTS: tuple[tuple[Collection[str], Callable[[Config], str]], ...] = (
    (
        ("data.path",),
        lambda c: (
            "with data.source=digits: the digits are embedded; leave --data.source out"
            if c.data.source == "digits"
            else ""
        ),
    ),
    (
        [f"data.{n}" for n in ("train", "val", "include", "exclude", "group", "holdout")],
        _of_embedded,
    ),
    (("data.labels",), lambda c: "" if asks_for_few(c.data.labels) else _of_embedded(c)),
    (
        ("data.shuffle_window",),
        lambda c: (
            f"with data.source={c.data.source}; it is for shards"
            if c.data.source in OWN_IMAGES and c.data.source != "shards"
            else _of_embedded(c)
        ),
    ),
    (
        ("optim.milestones", "optim.gamma"),
        lambda c: (
            f"with optim.schedule={c.optim.schedule}; --optim.schedule step uses it"
            if c.optim.schedule != "step"
            else ""
        ),
    ),
    (
        ("optim.betas",),
        lambda c: f"with optim.name={c.optim.name}" if c.optim.name != "adamw" else "",
    ),
    (("optim.momentum",), lambda c: "with optim.name=adamw" if c.optim.name == "adamw" else ""),
    (
        ("augment.blur_sigma",),
        lambda c: "with augment.blur 0" if max(c.augment.blur, c.augment.blur_2) <= 0 else "",
    ),
    (("augment.jitter",), lambda c: "with augment.jitter_p 0" if not c.augment.jitter_p else ""),
    (("augment.jitter_p",), lambda c: "with augment.jitter 0" if not any(c.augment.jitter) else ""),
)


def _check_owners(options: Collection[str], method: str) -> None:
    """Raises ConfigError for a given option that other methods than `method` have."""
    own = {setting.name for setting in settings.settings("model", settings.groups(method)["model"])}
    for name in options:
        owners = settings.model_options().get(name, ())
        if owners and name not in own:
            raise ConfigError(
                f"{name}: no effect with model.method={method}; it is an option of "
                f"{', '.join(owners)}"
            )


def check_effects(config: Config, options: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises ConfigError for a given option that changes nothing, and says why.

    options: the given options. before: the configuration without the options, as dictionaries.
    """
    now = settings.to_dict(config)
    for names, why in _EFFECTS:
        for name in options.keys() & set(names):
            group, key = name.split(".")
            if now[group][key] != before[group].get(key) and (reason := why(config)):
                raise ConfigError(f"{name}: no effect {reason}")
