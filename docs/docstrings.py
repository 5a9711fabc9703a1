"""Shows the docstrings' lists of arguments as lists on the site.

In a docstring an argument is a line `name: meaning`, and further lines of its meaning are indented.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): ")


class Arguments(griffe.Extension):
    """An extension of griffe, which reads the docstrings for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """Returns a docstring in Markdown: every line `name: meaning` becomes an item of a list."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        named = ARGUMENT.match(line)
        goes_on = in_list and line.startswith("    ")
        if named:
            lines += [] if in_list else [""]
            names = ", ".join(f"`{name}`" for name in named[1].split(", "))
            line = f"- {names}: {line[named.end() :]}"
        elif in_list and not goes_on:
            lines.append("")
        in_list = bool(named) or goes_on
        lines.append(line)
    return "\n".join(lines)
