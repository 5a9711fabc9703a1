"""The compiled library of views: photometric.c and resize.c, and how PyTorch rounds here.

The library is loaded by ctypes, which holds no lock of Python during a call. `photometric` and
`resize` use functions that equal PyTorch's operators in a comparison (`compared`).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch
from mocofast_kernels.cpu_library import INSTALL

from mocofast.errors import describe_error

T = TypeVar("T")

LIBRARY = "mocofast.data._photometric"
# Sets of instructions, by their numbers in photometric.c. All but the first round a product and
# a sum together.
VARIANTS = ("plain", "fused", "AVX2")


def compared(
    build: Callable[[ctypes.CDLL, int], T], differs: Callable[[T], bool], what: str
) -> tuple[T | None, str]:
    """Returns functions of the library and their instructions, or None and the reason.

    build: takes the library and the number of a set of instructions.
    differs: returns whether the functions differ from PyTorch's operators.
    what: the results of the functions, for the reason.
    """
    found = importlib.util.find_spec(LIBRARY)
    if found is None or found.origin is None:
        return None, f"not compiled: {INSTALL}"
    try:
        library = ctypes.CDLL(found.origin)
        for variant in (2, 1) if rounds_together() else (0,):
            if library.photometric_runs(variant):
                try:
                    functions = build(library, variant)
                except AttributeError as error:
                    return None, f"compiled from an older version: {INSTALL} ({error})"
                if differs(functions):
                    return None, f"{VARIANTS[variant]}: {what} differ from PyTorch's"
                return functions, VARIANTS[variant]
    # Another platform, a missing function, or PyTorch rounds in two ways.
    except Exception as error:
        return None, describe_error(error)
    return None, "this CPU has no instructions for PyTorch's rounding"


def rounds_together() -> bool:
    """Returns whether PyTorch rounds a product and a sum together, as a fused multiply-add.

    Raises RuntimeError if PyTorch does for some operators or sizes only.
    """
    factor = 7471 / 65536
    factors = torch.full((1, 1, 1), factor, dtype=torch.float32, device="cpu")
    found = set()
    for count in (7, 64, 1023):  # a tail, whole vectors, and a long row with a tail
        x = torch.arange(40001, 40001 + count, dtype=torch.float32, device="cpu").view(1, 1, count)
        y = x.flip(2) * (1 / 3)
        exact = y.double() + x.double() * factors.double()
        together, apart = exact.float(), y + x * factor
        differ = together != apart
        for got in (
            y.add(x, alpha=factor),
            torch.addcmul(y, x, factors),
            torch.addcmul(y, x.expand(2, 1, count)[1:], factors),
        ):
            found.add((bool((got == together).all()), bool((got == apart).all())))
        if not differ.any():
            found.discard((True, True))
    if found not in ({(True, False)}, {(False, True)}):
        raise RuntimeError("PyTorch rounds products and sums in two ways")
    return found == {(True, False)}
