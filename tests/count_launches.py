"""Counts the launches of InfoNCE on CUDA without a GPU: python -m tests.count_launches.

Triton's launches are recorded instead of made, on tensors without storage. PyTorch's dispatcher
tells the operators. Prints a JSON object, {way to call: [kernels and operators, in order]}.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
from mocofast_bench import inspect_code
from torch.utils._python_dispatch import TorchDispatchMode

from mocofast import ops
from mocofast.ops import backend

# Operators that launch nothing: they allocate memory, or compute on the host.
FREE = {"empty", "detach", "promote_types"}


class Launches(TorchDispatchMode):
    """Notes operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(dtype: torch.dtype, known: bool) -> list[str]:
    """Returns the launches of a forward and backward pass with MoCo's queue."""
    query, positive, queue = (
        torch.empty(rows, 128, dtype=dtype, device="meta") for rows in (256, 256, 65536)
    )
    query.requires_grad_()
    unit = ops.unit_gradient(query.device)

    def call() -> None:
        loss = ops.info_nce(query, positive, queue, temperature=0.2, negatives_normalized=True)
        # As inside a network, where nobody else holds the gradient.
        torch.autograd.grad(loss, query, unit if known else None)

    with Launches() as mode:
        kernels = [launch.kernel.__name__ for launch in inspect_code.record(call)]
    return kernels + mode.names


if __name__ == "__main__":
    triton = backend.backend_for("cuda")
    with (
        mock.patch.object(backend, "backend_for", return_value=triton),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # not of "meta"
    ):
        found = {
            f"{dtype}, {'unit_gradient' if known else 'backward()'}": launches(dtype, known)
            for dtype in (torch.float32, torch.bfloat16)
            for known in (True, False)
        }
    print(json.dumps(found))
