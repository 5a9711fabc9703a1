"""Chooses where kernel tests run: compiled on a GPU, else in Triton's interpreter on the CPU.

Import this module before anything that imports triton, because `triton.jit` decides at decoration,
also for the functions of triton's own library.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _teach_the_interpreter_bfloat16() -> None:
    """Replaces two operations of Triton 3.6's interpreter that are wrong for bfloat16.

    The conversion to bfloat16 truncates, and a product of bfloat16 matrices multiplies the integers
    that encode the numbers. PyTorch rounds here, and products are computed in float32. Otherwise
    the errors of the interpreter would hide errors of the kernels.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        # The upper half of a float32 holds the bits of a bfloat16.
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        source, target = x.dtype.scalar, dtype.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return widened(x)
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(x.data)).bfloat16()
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(bits, tl.bfloat16)
        return cast(self, x, dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *how)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_impl)


if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET=1 was set: "
            "import tests.triton_device first"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    _teach_the_interpreter_bfloat16()
