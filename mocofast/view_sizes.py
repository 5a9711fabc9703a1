"""Sizes of views, and schedules of options by epochs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from mocofast.option import Valid

# Of a view or an image, in pixels: the side of a square, or (height, width) of other shapes.
Size: TypeAlias = int | tuple[int, int]


def height_width(size: Size) -> tuple[int, int]:
    """Returns (height, width)."""
    return (size, size) if isinstance(size, int) else size


def as_size(height: int, width: int) -> Size:
    """Returns the size of one spelling: a number for squares."""
    return height if height == width else (height, width)


def pixels_text(size: Size) -> str:
    """Returns a size in words: "224" for a square, "224 x 448" (height first) otherwise."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


def stages(values: tuple[str, ...]) -> dict[int, tuple[float, ...]]:
    """Reads a schedule by epochs, ("0:16", "10:24"), as {first epoch: numbers}.

    Raises ValueError unless every value is an epoch and numbers, and epochs rise from 0.
    """
    rows = [value.split(":") for value in values]
    found = {int(epoch): tuple(map(float, numbers)) for epoch, *numbers in rows}
    if len(found) < len(rows) or list(found) != sorted(found) or min(found, default=0) != 0:
        raise ValueError(f"expected epochs that rise from 0: got {', '.join(values)}")
    return found


def staged(holds: Callable[[tuple[float, ...]], bool], expected: str) -> Valid:
    """Returns the condition that a value is a schedule of numbers that satisfy `holds`."""

    def valid(values: tuple[str, ...]) -> bool:
        try:
            found = stages(values).values()
        except ValueError:
            return False
        return all(map(holds, found))

    return Valid(valid, f"{expected}, with epochs that rise from 0")


def last(values: tuple[str, ...], epoch: int, default: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the numbers of the last stage that begins at `epoch` or before."""
    found = {first: numbers for first, numbers in stages(values).items() if first <= epoch}
    return found[max(found)] if found else default
