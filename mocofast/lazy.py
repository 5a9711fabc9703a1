"""Lazy public names of packages: a module is imported on first use of a name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_members(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package (PEP 562).

    package: the package's `__name__`.
    modules: {module in the package: names to export}. A module without names is itself exported.
    """
    submodules = {module: f"{package}.{module}" for module, names in modules.items() if not names}
    defined_in = {
        name: f"{package}.{module}" for module, names in modules.items() for name in names
    }

    def get(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(submodules[name])
        if name not in defined_in:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(defined_in[name]), name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *defined_in, *submodules})

    return get, list_names
