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
    """Returns the condition that every number of a value is `least` or more."""
    return Valid(lambda value: _smallest(value) >= least, f"at least {least}")


def above(bound: float) -> Valid:
    """Returns the condition that every number of a value is larger than `bound`."""
    return Valid(lambda value: _smallest(value) > bound, f"above {bound}")


def between(low: float, high: float, expected: str = "") -> Valid:
    """Returns the condition that a value lies in [low, high]."""
    return Valid(lambda value: low <= value <= high, expected or f"between {low} and {high}")


def _smallest(value: Any) -> float:
    return min(value) if isinstance(value, tuple) else value


SHARE = Valid(lambda value: 0 <= value < 1, "from 0 to below 1")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    valid: Valid | None = None,
    plugins: bool = False,
) -> Any:
    """Declares one option of a group.

    default: the default, which stands nowhere else.
    help: the meaning of the option, with units. `--help-all` shows this text.
    choices: the allowed values, or None.
    valid: a condition on the value, or None.
    plugins: also allow the dotted name of a module.
    """
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "valid": valid, "plugins": plugins},
    )
