"""The errors of configurations and of runs that diverge, and words for messages of errors."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A recipe, option or value cannot be used. The message names it and says what was expected."""


class DivergedError(RuntimeError):
    """A run has lost its weights: loss or weights are not finite. The message says what to do."""


def describe_error(error: BaseException) -> str:
    """Returns the name of the error's class and the error's message: "OSError: disk full"."""
    return f"{type(error).__name__}: {error}"


def list_choices(names: Sequence[str]) -> str:
    """Returns names as words of a sentence: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
