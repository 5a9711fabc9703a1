"""The optional compiled library of the ops on CPUs, `_compiled`, from the C files of this folder.

The library is loaded by ctypes, which holds no lock of Python during a call. Without the library,
or on a CPU without its instructions, PyTorch's operators compute.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mocofast_kernels.remembered import KINDS

NAME = "mocofast_kernels._compiled"
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
INSTALL = "install a C compiler, then pip install --force-reinstall --no-deps mocofast"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """Returns the library, or None and the reason."""
    found = importlib.util.find_spec(NAME)
    if found is None or found.origin is None:
        return None, f"not compiled: {INSTALL}"
    try:
        return ctypes.CDLL(found.origin), ""
    except OSError as error:  # of another platform
        return None, str(error)


def function(prototype: Any, name: str) -> Any:
    """Returns a function of the library, None without the library or the function.

    prototype: of `ctypes.CFUNCTYPE`. A library of an older version may lack the function.
    """
    found, _ = library()
    try:
        return None if found is None else prototype((name, found))
    except AttributeError:
        return None


def takes(x: Tensor) -> bool:
    """Returns whether the library reads x.float() as it lies in memory.

    That is a contiguous tensor of float32, bfloat16 or float16 on a CPU.
    """
    plain = type(x) in KINDS and x.dtype in _FLOATS and x.device.type == "cpu"
    return plain and x.is_contiguous() and not x.is_neg()


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Returns the addresses of contiguous tensors, None for None."""
    return [None if x is None else x.data_ptr() for x in tensors]


def function_of_openmp(name: str) -> Any:
    """Returns a function of PyTorch's OpenMP, or None."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another OpenMP; Windows
        return None


@functools.cache
def threads_of_openmp() -> Any:
    """Returns the function of GNU OpenMP that runs a function on PyTorch's own threads, or None.

    After an operator of PyTorch its threads wait for the next operator for milliseconds, without
    sleep. Threads of another pool would share the cores with them.
    """
    found = function_of_openmp("GOMP_parallel")
    return None if found is None else ctypes.cast(found, ctypes.c_void_p)


def is_watched() -> bool:
    """Says whether operations are watched (a dispatch mode of PyTorch is active).

    A counter of operations, say, sees none inside the library.
    """
    return torch._C._len_torch_dispatch_stack() > 0
