"""Patterns of names with braces, as shells know them."""

from __future__ import annotations

import itertools
import math
import re

from mocofast.config import ConfigError

MOST_NAMES = 100_000  # that a pattern may expand to
_PARTS = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def expand_braces(pattern: str) -> list[str]:
    """Expands braces: x{08..10}-{a,b} gives x08-a, x08-b, x09-a, ...

    Numbers are as wide as the first number. Raises ConfigError for more than MOST_NAMES names.
    """
    # Texts and braces take turns. Texts come first and last.
    texts_and_braces = _PARTS.split(pattern)
    options: list[list[str] | range] = []
    widths: list[int] = []
    for number, part in enumerate(texts_and_braces):
        numbers = _NUMBERS.fullmatch(part) if number % 2 else None
        widths.append(len(numbers[1]) if numbers else 0)
        if numbers:
            options.append(range(int(numbers[1]), int(numbers[2]) + 1))
        else:
            options.append(part.split(",") if number % 2 else [part])
    # The length of a range may be too large for len().
    count = math.prod(max(0, o.stop - o.start) if isinstance(o, range) else len(o) for o in options)
    if count > MOST_NAMES:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        raise ConfigError(
            f"data.path: {shown!r} stands for {f'{count:,}' if count < 10**18 else 'far too many'} "
            f"names, expected at most {MOST_NAMES:,}"
        )
    texts = (
        [f"{o:0{width}}" for o in part] if isinstance(part, range) else part
        for part, width in zip(options, widths)
    )
    return ["".join(parts) for parts in itertools.product(*texts)]
