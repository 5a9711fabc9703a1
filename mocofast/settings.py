"""Reads files and command lines into a `Config`, and writes a `Config` as YAML or flags.

Names, types and ranges are checked. An error names the option and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mocofast import yaml_files
from mocofast.config import (
    METHODS,
    OWN_IMAGES,
    Config,
    ConfigError,
    ModelConfig,
    check_options,
    method_options,
)
from mocofast.option import Valid
from mocofast.plugins import is_plugin
from mocofast.view_sizes import Size, as_size, pixels_text, stages

log = logging.getLogger("mocofast")

DEFAULT_RECIPE = "digits"


class Setting(typing.NamedTuple):
    """An option of a group, for the command line and YAML files."""

    name: str  # "group.option"
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None
    valid: Valid | None
    plugins: bool


def settings(group: str, kind: type) -> Iterator[Setting]:
    """Yields every option of a group's dataclass."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        yield Setting(
            f"{group}.{f.name}",
            hints[f.name],
            f.default,
            f.metadata["help"],
            f.metadata["choices"],
            f.metadata["valid"],
            f.metadata["plugins"],
        )


def groups(method: str = ModelConfig.method) -> dict[str, type]:
    """Returns the groups of a pretraining run, {name: dataclass}, with the options of `method`."""
    kinds = {name: kind for name, kind in typing.get_type_hints(Config).items() if name != "recipe"}
    return {**kinds, "model": method_options(method)}


def model_options() -> dict[str, dict[str, Setting]]:
    """Returns the options of every method of METHODS, {option: {method: setting}}."""
    found: dict[str, dict[str, Setting]] = {}
    for method in METHODS:
        for setting in settings("model", method_options(method)):
            found.setdefault(setting.name, {})[method] = setting
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" if a known name resembles `name`, else ""."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def coerce(setting: Setting, value: Any) -> Any:
    """Returns `value`, from YAML or as a command line's text, in the setting's type.

    Raises ConfigError if the value has no such type or is not among the choices.
    """
    try:
        result = _coerce(setting.type, value)
    except (KeyError, TypeError, ValueError, OverflowError):
        kinds = typing.get_args(setting.type)
        if setting.type == Size:
            expected = "a number, or HEIGHT,WIDTH"
        elif kinds:
            count = "" if Ellipsis in kinds else f"{len(setting.default)} "
            expected = f"{count}values like {setting.default}"
        else:
            expected = "text in UTF-8" if setting.type is str else setting.type.__name__
        if setting.default == () and setting.valid:
            expected = setting.valid.expected
        raise ConfigError(f"{setting.name}: expected {expected}, got {value!r:.100}") from None
    plugin = setting.plugins and is_plugin(result)
    if setting.choices and result not in setting.choices and not plugin:
        raise ConfigError(
            f"{setting.name}: expected one of {', '.join(setting.choices)}, got {value!r}"
            f"{nearest(str(value), setting.choices)}"
        )
    return result


def _coerce(kind: Any, value: Any) -> Any:
    if kind == Size:
        has_two = isinstance(value, (list, tuple)) or (isinstance(value, str) and "," in value)
        return as_size(*_coerce(tuple[int, int], value)) if has_two else _coerce(int, value)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if isinstance(value, str):
            # A bracket may begin a pattern.
            text = value if kinds[0] is str else value.strip("[]() ")
            value = [part.strip() for part in text.split(",") if part.strip()]
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
        value.encode()  # raises ValueError for bytes that are no text: config.yaml holds text
        return value
    if isinstance(value, bool) or (
        kind is int and isinstance(value, float) and value != int(value)
    ):
        raise TypeError
    result = kind(value)
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError
    if isinstance(result, int) and abs(result) >= 2**63:
        raise ValueError
    return result


def apply(config: Config, values: Mapping[str, Any]) -> None:
    """Sets options in place.

    values: {"group.option": value}. An option of another method than `model.method` is left out,
        with a warning unless the value is the other method's default.
    A change of `model.method` keeps the values that differ from the old method's defaults, of
    options that the new method also has.
    Raises ConfigError for an unknown name or a wrong type, and then sets nothing.
    """
    method = str(values.get("model.method", config.model.method))
    kinds = groups(method)
    known = {s.name: s for group, kind in kinds.items() for s in settings(group, kind)}
    coerced = {}
    for name, value in values.items():
        if name in known:
            coerced[name] = coerce(known[name], value)
        else:
            _check_option_of_another_method(name, value, method, known)
    if type(config.model) is not kinds["model"]:
        config.model = _for_method(config.model, kinds["model"])
    for name, value in coerced.items():
        group, key = name.split(".")
        setattr(getattr(config, group), key, value)


def _check_option_of_another_method(
    name: str, value: Any, method: str, known: Iterable[str]
) -> None:
    """Warns about an option that `method` ignores; ConfigError if no method has the option."""
    owners = model_options().get(name)
    if not owners:
        raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
    setting = next(iter(owners.values()))
    if coerce(setting, value) != setting.default and os.environ.get("RANK", "0") == "0":
        log.warning("%s is an option of %s; %s ignores it", name, ", ".join(owners), method)


def _for_method(model: ModelConfig, kind: type[ModelConfig]) -> ModelConfig:
    """Returns options of class `kind`, with the values of `model` that differ from defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(model)}
    names = {f.name for f in dataclasses.fields(kind)}
    changed = {k: v for k, v in vars(model).items() if v != defaults[k] and k in names}
    return kind(**changed)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns a configuration from a whole or partial dictionary, as YAML holds it.

    values: {"recipe": name, group: {option: value}}.
    """
    recipe, model = values.get("recipe", "custom"), values.get("model")
    if recipe in ("detect", "segment") and isinstance(model, Mapping) and "init" in model:
        raise ConfigError(
            f"the options of a run of mocofast {recipe}, which mocofast report shows; expected a "
            "run of mocofast pretrain"
        )
    config = Config(recipe=str(recipe))
    flat = {}
    for group, content in values.items():
        if group == "recipe":
            continue
        if group not in groups() or not isinstance(content, Mapping):
            raise ConfigError(f"unknown group {group!r}{nearest(group, groups())}")
        flat.update({f"{group}.{key}": value for key, value in content.items()})
    apply(config, flat)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration, a dataclass of groups, as plain dictionaries, lists and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def differences(config: Any, base: Any) -> dict[str, Any]:
    """Returns the options of `config` that differ from `base`, {"group.option": value}.

    config, base: dataclasses of groups, of the same groups.
    """
    missing = object()
    found = {}
    for group in (name for name in vars(base) if name != "recipe"):
        for name, value in vars(getattr(config, group)).items():
            if value != getattr(getattr(base, group), name, missing):
                found[f"{group}.{name}"] = value
    return found


def as_yaml(options: Mapping[str, Any]) -> str:
    """Returns options, {"group.option": value}, as the text of a recipe."""
    import yaml  # here, so that `mocofast --help` does without it

    grouped: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, key = name.split(".")
        grouped.setdefault(group, {})[key] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(grouped, sort_keys=False)


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Returns options, {"group.option": value}, as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", shown(value))]


def recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package."""
    folder = resources.files("mocofast") / "recipes"
    return sorted(
        entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def about(recipe: str) -> str:
    """Returns the first sentence of the comment of a recipe that ships, without references."""
    text = (resources.files("mocofast") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.sub(r" \([^)]*\)", "", words).split(". ")[0].removesuffix(".")


def load_recipe(name: str) -> Config:
    """Returns the configuration of a recipe.

    name: a shipped recipe, or a YAML file, whose name ends in .yaml or .yml.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no recipe file {name!r}")
        content, title = path.read_bytes(), path.stem
    elif name in recipes():
        shipped = resources.files("mocofast") / "recipes" / f"{name}.yaml"
        content, title = shipped.read_bytes(), name
    else:
        raise ConfigError(
            f"unknown recipe {name!r}{nearest(name, recipes())} (there are: {', '.join(recipes())})"
        )
    values, lines = yaml_files.read(content, name)
    try:
        return from_dict({"recipe": title, **values})
    except ConfigError as error:
        raise yaml_files.at_line(error, name, lines) from None


def validate(config: Config) -> None:
    """Checks every value, and values together.

    Raises ConfigError that names the option, its value and what was expected.
    """
    check_options(config.model)
    for group, kind in groups(config.model.method).items():
        for setting in settings(group, kind):
            value = getattr(getattr(config, group), setting.name.split(".")[1])
            if setting.valid and not setting.valid.holds(value):
                raise _unexpected(setting.name, setting.valid.expected, value)
    config.model.validate()
    if config.data.batch_size % config.train.accumulate:
        raise _unexpected(
            "data.batch_size", "a multiple of train.accumulate", config.data.batch_size
        )
    _check_statistics(config)
    _check_range(config)
    _check_schedules(config)
    _check_turns(config)
    if config.data.source in OWN_IMAGES and not config.data.path:
        raise ConfigError("data.path: expected the folder of images, got nothing (--data.path DIR)")


def _check_schedules(config: Config) -> None:
    """Checks batches, that the cool-down fits into the run, and that a plateau can be seen."""
    o, epochs = config.optim, config.train.epochs
    batch, sizes = config.data.batch_size, config.data.batch_sizes
    if any(images % batch for (images,) in stages(sizes).values()):
        raise _unexpected(
            "data.batch_sizes", f"multiples of data.batch_size, {batch}", ",".join(sizes)
        )
    if o.schedule == "wsd" and o.warmup_epochs + o.cooldown_epochs > epochs:
        raise _unexpected(
            "optim.cooldown_epochs",
            f"at most train.epochs less optim.warmup_epochs, {epochs - o.warmup_epochs:g}",
            o.cooldown_epochs,
        )
    if config.knn.patience and not config.knn.every:
        raise _unexpected("knn.every", "at least 1 where knn.patience is above 0", 0)


def _check_turns(config: Config) -> None:
    """Checks that views keep their shape."""
    wide = [size for size in config.augment.training_sizes() if not isinstance(size, int)]
    if wide and config.augment.quarter_turns:
        raise _unexpected(
            "augment.quarter_turns",
            f"0 for views of {pixels_text(wide[0])} pixels, because a turn exchanges height and "
            "width (flip and vertical_flip keep them)",
            config.augment.quarter_turns,
        )


def _check_range(config: Config) -> None:
    """Checks that data.range has numbers for all channels, or for every channel."""
    kind, _, numbers = config.data.range.rpartition(":")
    count, channels = len(numbers.split(",")), config.data.channels
    pairs = count if kind == "divide" else count // 2
    if kind != "percentile" and pairs not in (0, 1, channels):
        raise ConfigError(
            f"data.range: got numbers for {pairs} channels, expected numbers for all channels "
            f"together, or for {channels} (data.channels): {config.data.range}"
        )


def _check_statistics(config: Config) -> None:
    """Checks that augment.mean and augment.std have one value, or one value a channel."""
    channels = config.data.channels
    for name in ("mean", "std"):
        value = getattr(config.augment, name)
        if len(value) not in (1, channels):
            expected = "1 value" if channels == 1 else f"{channels} values or 1 value"
            raise ConfigError(
                f"augment.{name}: expected {expected} (data.channels is {channels}), "
                f"got {len(value)}: {shown(value)}"
            )


def _unexpected(name: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{name}: expected {expected}, got {value!r}")


def shown(value: Any) -> str:
    """Returns a value, of a configuration or of a YAML file, as the command line takes it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or ","
    return "none" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
