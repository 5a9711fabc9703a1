"""What a fused optimiser cannot do: options of torch.optim, and companions of other shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mocofast.ops.local import check_sharded_alike, is_plain

# Options that a state dict of PyTorch's optimisers may hold, with the only supported value.
UNSUPPORTED = {
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
    "differentiable": False,
    "amsgrad": False,
}


def check_options(kind: type, group: dict[str, Any]) -> None:
    """Raises ValueError for an option of a group that a fused optimiser does not have."""
    for name, value in UNSUPPORTED.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}: {kind.__name__} has {value} only: got {group[name]}")


def checked_tensors(name: str, tensors: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Returns tensors that fit the parameters. Raises ValueError for others, by name."""
    if len(tensors) != len(params):
        raise ValueError(
            f"{name} must have a tensor for each parameter: got {len(tensors)} for {len(params)}"
        )
    for i, (tensor, p) in enumerate(zip(tensors, params)):
        kind = "complex" if p.is_complex() else "floating"
        fits = tensor.is_complex() if p.is_complex() else tensor.is_floating_point()
        if tensor.shape != p.shape or tensor.device != p.device or not fits:
            raise ValueError(
                f"{name}, tensor {i} must be {kind}, of shape {tuple(p.shape)} on {p.device}: "
                f"got {tensor.dtype}, {tuple(tensor.shape)} on {tensor.device}"
            )
        if not is_plain((tensor, p)):
            check_sharded_alike(f"{name}, tensor {i}", tensor, "its parameter", p)
    return tensors
