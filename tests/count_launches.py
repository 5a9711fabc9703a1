"""Counts the launches of InfoNCE on CUDA without a GPU: python -m tests.count_launches.

Triton's launches are recorded instead of made, on tensors without storage. PyTorch's dispatcher
tells the operators. Prints a JSON object, {way to call: [kernels and operators, in order]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from mocofast_bench import inspect_code
from torch import Tensor
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


class Network(torch.autograd.Function):
    """Stands for an encoder: takes the gradient of its output, and nobody else holds it."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        assert gradient.shape == (256, 128)


# {name: how a user starts the backward pass}
WAYS: dict[str, Callable[[Tensor], object]] = {
    "backward()": lambda loss: loss.backward(),
    "a part of a sum": lambda loss: (loss + 1).backward(ops.unit_gradient(loss.device)),
    "another gradient": lambda loss: (2 * loss).backward(),
}


def launches(dtype: torch.dtype, way: Callable[[Tensor], object]) -> list[str]:
    """Returns the launches of a forward and backward pass with MoCo's queue."""
    features, positive, queue = (
        torch.empty(rows, 128, dtype=dtype, device="meta") for rows in (256, 256, 65536)
    )
    features.requires_grad_()
    ops.unit_gradient(features.device)  # filled once in the life of a process

    def call() -> None:
        query = Network.apply(features)
        way(ops.info_nce(query, positive, queue, temperature=0.2, negatives_normalized=True))

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
            f"{dtype}, {name}": launches(dtype, way)
            for dtype in (torch.float32, torch.bfloat16)
            for name, way in WAYS.items()
        }
    print(json.dumps(found))
