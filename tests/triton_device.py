"""Where kernel tests run: through the real compiler on a GPU, else through Triton's interpreter on the CPU.

Import this before anything that imports triton: `triton.jit` decides at decoration, triton's own library included.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _teach_the_interpreter_bfloat16() -> None:
    """Triton 3.6's interpreter truncates where it converts to bfloat16 and multiplies matrices of bfloat16 as the
    integers they are stored in. Both would hide our errors behind its own, so both are done by PyTorch here."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        source, target = x.dtype.scalar, dtype.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return widened(x)
        if source == tl.float32 and target == tl.bfloat16:
            rounded = (
                torch.from_numpy(np.array(x.data))
                .bfloat16()
                .view(torch.int16)
                .numpy()
                .view(np.uint16)
            )
            return TensorHandle(rounded, tl.bfloat16)
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
            "triton was imported before TRITON_INTERPRET=1 was set: import tests.triton_device first"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    _teach_the_interpreter_bfloat16()
