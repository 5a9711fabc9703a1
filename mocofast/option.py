"""Declares options: a default, a meaning, and what other values must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple


class Valid(NamedTuple):
    """A condition on one value, and the words of an error that says what was expected."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: float) -> Valid:
    """Every number of the value is `least` or more."""
    return Valid(lambda value: _smallest(value) >= least, f"at least {least}")


def above(bound: float) -> Valid:
    """Every number of the value is larger than `bound`."""
    return Valid(lambda value: _smallest(value) > bound, f"above {bound}")


def between(low: float, high: float, expected: str = "") -> Valid:
    """The value lies in [low, high]."""
    return Valid(lambda value: low <= value <= high, expected or f"between {low} and {high}")


def _smallest(value: Any) -> float:
    return min(value) if isinstance(value, tuple) else value


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    valid: Valid | None = None,
    plugins: bool = False,
) -> Any:
    """Declares one option of a group.

    default: the only place of the default.
    help: what the option means, with units; `--help` shows it.
    choices: the allowed values, where they are a closed set.
    valid: what every other value has to satisfy.
    plugins: the dotted name of a module is a value beside the choices.
    """
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "valid": valid, "plugins": plugins},
    )
