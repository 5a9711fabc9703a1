"""Where PyTorch has to see PyTorch's operators."""

from __future__ import annotations

import torch
from mocofast_kernels.cpu_library import is_watched
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Says whether PyTorch traces, compiles, transforms or watches the operators that run here.

    A library in C runs outside of torch.compile, torch.func, forward-mode differentiation and
    dispatch modes (counters of operations, say).
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_watched()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
