"""Loads modules and functions of the user that stand behind an option."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mocofast.errors import ConfigError


def is_plugin(name: str) -> bool:
    """Returns whether a value is the dotted name of a module, as in "my_package.my_method"."""
    return all(part.isidentifier() for part in name.split(".")) and "." in name


def load_plugin(option: str, name: str, *attributes: str) -> Any:
    """Imports a module that stands behind an option.

    option: for error messages. name: the module's dotted name.
    attributes: what the module must define.
    Raises ConfigError if there is no such module, or if an attribute is missing.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ConfigError(f"{option}: there is no module {name!r} ({error})") from None
    missing = [attribute for attribute in attributes if not hasattr(module, attribute)]
    if missing:
        raise ConfigError(f"{option}: the module {name!r} does not define {', '.join(missing)}")
    return module


def load_function(option: str, name: str) -> Callable[..., Any]:
    """Imports a function that stands behind an option.

    option: for error messages. name: package.module:function.
    Raises ConfigError if there is no such module or function.
    """
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(load_plugin(option, module, attribute), attribute)
    if not callable(found):
        raise ConfigError(f"{option}: {name!r} is no function, but of type {type(found).__name__}")
    return found
