"""From files and command lines to a `Config` and back: names, types and sense checked, errors name the nearest."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mocofast.config import Config, ConfigError

DEFAULT_RECIPE = "digits"


class Setting(typing.NamedTuple):
    """One option of one group, as the command line and the YAML files see it."""

    name: str  # "group.option"
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None


def settings(group: str, kind: type) -> Iterator[Setting]:
    """Every option of a group's dataclass."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        yield Setting(
            f"{group}.{f.name}",
            hints[f.name],
            f.default,
            f.metadata["help"],
            f.metadata.get("choices"),
        )


def groups() -> dict[str, type]:
    """The groups of a pretraining run: name to dataclass."""
    hints = typing.get_type_hints(Config)
    return {name: kind for name, kind in hints.items() if name != "recipe"}


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' where a known name resembles `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def coerce(setting: Setting, value: Any) -> Any:
    """`value`, from YAML or as text from the command line, as the setting's type; ConfigError if it is not one."""
    try:
        result = _coerce(setting.type, value)
    except (KeyError, TypeError, ValueError):
        plain = not typing.get_args(setting.type)
        expected = (
            setting.type.__name__
            if plain
            else f"{len(setting.default)} values like {setting.default}"
        )
        raise ConfigError(f"{setting.name}: expected {expected}, got {value!r}") from None
    if setting.choices and result not in setting.choices:
        raise ConfigError(
            f"{setting.name}: expected one of {', '.join(setting.choices)}, got {value!r}"
            f"{nearest(str(value), setting.choices)}"
        )
    return result


def _coerce(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = [part for part in value.strip("[]() ").split(",") if part.strip()]
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(_coerce(kinds[0], part) for part in value)
        if len(kinds) != len(value):
            raise ValueError
        return tuple(_coerce(k, part) for k, part in zip(kinds, value))
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
            str(value).lower()
        ]
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if isinstance(value, bool) or (
        kind is int and isinstance(value, float) and value != int(value)
    ):
        raise TypeError
    result = kind(value)
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError
    return result


def apply(config: Config, values: Mapping[str, Any]) -> None:
    """Sets {"group.option": value}; unknown names and values of another type raise ConfigError and set nothing."""
    known = {s.name: s for group, kind in groups().items() for s in settings(group, kind)}
    coerced = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
        coerced[name] = coerce(known[name], value)
    for name, value in coerced.items():
        group, key = name.split(".")
        setattr(getattr(config, group), key, value)


def from_dict(values: Mapping[str, Any]) -> Config:
    """A whole or partial configuration as YAML holds it: {"recipe": name, group: {option: value}}."""
    config = Config(recipe=str(values.get("recipe", "custom")))
    flat = {}
    for group, content in values.items():
        if group == "recipe":
            continue
        if group not in groups() or not isinstance(content, Mapping):
            raise ConfigError(f"unknown group {group!r}{nearest(group, groups())}")
        flat.update({f"{group}.{key}": value for key, value in content.items()})
    apply(config, flat)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(config: Config, base: Config) -> dict[str, Any]:
    """{"group.option": value} of `config` that are others in `base`."""
    found = {}
    for group in groups():
        for name, value in vars(getattr(config, group)).items():
            if value != getattr(getattr(base, group), name):
                found[f"{group}.{name}"] = value
    return found


def as_yaml(options: Mapping[str, Any]) -> str:
    """{"group.option": value} as a recipe's text."""
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, key = name.split(".")
        grouped.setdefault(group, {})[key] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(grouped, sort_keys=False)


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """{"group.option": value} as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", shown(value))]


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("mocofast") / "recipes"
    return sorted(
        entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Config:
    """The configuration of a shipped recipe, or of a YAML file (a name that ends in .yaml or .yml)."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no recipe file {name!r}")
        text, title = path.read_text(encoding="utf-8"), path.stem
    elif name in recipes():
        text, title = (
            (resources.files("mocofast") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"),
            name,
        )
    else:
        raise ConfigError(
            f"unknown recipe {name!r}{nearest(name, recipes())} (there are: {', '.join(recipes())})"
        )
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a YAML file: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected groups of options, got {type(values).__name__}")
    return from_dict({"recipe": title, **values})


def validate(config: Config) -> None:
    """Checks that the numbers make sense together; ConfigError names the option, its value and what it must be."""
    c = config
    rules = {
        "model.dim": (c.model.dim >= 1, "at least 1"),
        "model.queue_size": (c.model.queue_size >= 1, "at least 1"),
        "model.momentum": (0 <= c.model.momentum <= 1, "between 0 and 1"),
        "model.temperature": (c.model.temperature > 0, "above 0"),
        "model.bn_splits": (c.model.bn_splits >= 1, "at least 1"),
        "model.hidden_dim": (c.model.hidden_dim >= 1, "at least 1"),
        "model.sync_bn": (
            not c.model.sync_bn or c.model.bn_splits == 1,
            "false where model.bn_splits is above 1",
        ),
        "model.prototypes": (c.model.prototypes >= 2, "at least 2"),
        "model.epsilon": (c.model.epsilon > 0, "above 0"),
        "model.freeze_prototypes": (c.model.freeze_prototypes >= 0, "at least 0"),
        "data.batch_size": (
            c.data.batch_size >= 1 and c.data.batch_size % c.train.accumulate == 0,
            "a multiple of train.accumulate",
        ),
        "data.prefetch": (c.data.prefetch >= 1, "at least 1"),
        "data.hw_decoder_load": (0 <= c.data.hw_decoder_load <= 1, "a share, 0 to 1"),
        "data.preallocate": (min(c.data.preallocate) >= 0, "at least 0"),
        "data.shuffle_window": (c.data.shuffle_window >= 0, "at least 0"),
        "data.holdout": (0 <= c.data.holdout < 1, "from 0 to below 1"),
        "augment.size": (c.augment.size >= 1, "at least 1"),
        "augment.crop_scale": (
            0 < c.augment.crop_scale[0] <= c.augment.crop_scale[1] <= 1,
            "two shares, 0 < smallest <= largest <= 1",
        ),
        "augment.blur_sigma": (
            0 < c.augment.blur_sigma[0] <= c.augment.blur_sigma[1],
            "0 < smallest <= largest",
        ),
        "augment.jitter": (
            min(c.augment.jitter) >= 0 and c.augment.jitter[3] <= 0.5,
            "at least 0; hue at most 0.5",
        ),
        "augment.std": (min(c.augment.std) > 0, "above 0"),
        "optim.lr": (c.optim.lr >= 0, "at least 0"),
        "optim.lr_per": (c.optim.lr_per >= 0, "at least 0"),
        "optim.betas": (
            0 <= min(c.optim.betas) <= max(c.optim.betas) < 1,
            "two shares, 0 to below 1",
        ),
        "optim.warmup_epochs": (c.optim.warmup_epochs >= 0, "at least 0"),
        "train.epochs": (c.train.epochs >= 0, "at least 0"),
        "train.accumulate": (c.train.accumulate >= 1, "at least 1"),
        "train.log_every": (c.train.log_every >= 1, "at least 1"),
        "train.max_steps": (c.train.max_steps >= 0, "at least 0"),
        "checkpoint.every_epochs": (c.checkpoint.every_epochs >= 1, "at least 1"),
        "checkpoint.every_steps": (c.checkpoint.every_steps >= 0, "at least 0"),
        "checkpoint.keep": (c.checkpoint.keep >= 0, "at least 0"),
        "knn.every": (c.knn.every >= 0, "at least 0"),
        "knn.k": (c.knn.k >= 1, "at least 1"),
        "knn.temperature": (c.knn.temperature > 0, "above 0"),
        "knn.bank": (c.knn.bank >= 1, "at least 1"),
        **{
            f"augment.{p}": (0 <= getattr(c.augment, p) <= 1, "a probability, 0 to 1")
            for p in ("flip", "jitter_p", "gray", "blur", "solarize")
        },
        **{
            f"augment.{p}": (
                getattr(c.augment, p) == -1 or 0 <= getattr(c.augment, p) <= 1,
                "a probability, or -1",
            )
            for p in ("blur_2", "solarize_2")
        },
    }
    for name, (holds, expected) in rules.items():
        if not holds:
            group, key = name.split(".")
            raise ConfigError(
                f"{name}: expected {expected}, got {getattr(getattr(c, group), key)!r}"
            )
    if c.data.source in ("folder", "shards") and not c.data.path:
        raise ConfigError("data.path: expected the folder of images, got nothing (--data.path DIR)")


def shown(value: Any) -> str:
    """A value as the command line would take it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or ","
    return "none" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
