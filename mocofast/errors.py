"""Errors as text, for logs and records."""

from __future__ import annotations


def describe_error(error: BaseException) -> str:
    """Returns the name of the error's class and the error's message: "OSError: disk full"."""
    return f"{type(error).__name__}: {error}"
