"""The gradient of a loss by itself, which kernels know to be 1 without a look at its value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_units: dict[torch.device, Tensor] = {}
# Devices without launches to save. A given gradient makes PyTorch import sympy, .5 s.
_FILLED = {"cpu"}


def unit_gradient(device: torch.device) -> Tensor:
    """Returns 1, () float32, on the device: the same tensor at every call. Do not write into it.

    With `total.backward(gradient=unit_gradient(total.device))` a total of several losses starts the
    backward pass without a fill by 1. `loss.backward()` of the mean of `info_nce` takes this
    gradient by itself, and has two launches on CUDA, forward and backward.
    """
    unit = _units.get(device)
    if unit is None or unit._version:  # a hook wrote into it
        with torch.inference_mode(False):
            unit = torch.ones((), dtype=torch.float32, device=device)
        # A graph under capture fills its tensors at the replay, and not now.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _units[device] = unit
    return unit


def root_gradient(device: torch.device) -> Tensor | None:
    """Returns the gradient that a backward pass on the device starts from. None: PyTorch's own."""
    return None if device.type in _FILLED else unit_gradient(device)


def is_unit(gradient: Tensor) -> bool:
    """Returns whether the gradient is the tensor of `unit_gradient`, as it was made."""
    return gradient is _units.get(gradient.device) and not gradient._version


class Mean(Tensor):
    """A mean of losses, () float32 with a gradient, whose `backward()` starts from `unit_gradient`.

    PyTorch would fill a tensor with 1, and the kernel would multiply by it: two launches more. In
    all else this is a tensor like others. Operators return plain tensors, as for
    `torch.nn.Parameter`, and files hold a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Computes gradients as `torch.Tensor.backward` does."""
        if gradient is None:
            gradient = root_gradient(self.device)
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def __repr__(self) -> str:  # type: ignore[override]  # PyTorch's takes an option, for wrappers
        return "tensor" + super().__repr__().removeprefix("Mean")

    def __format__(self, spec: str) -> str:  # PyTorch formats the numbers of plain tensors alone
        return format(self.detach(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def as_mean(loss: Tensor) -> Tensor:
    """Returns the mean of a kernel as `Mean`, without a graph yet.

    Other numbers than float32 and other classes of tensors (a fake tensor, which predicts memory)
    stay as they are. So do tensors of devices without launches to save: torch.compile's backend
    aot_eager refuses subclasses as inputs.
    """
    if loss.dtype != torch.float32 or type(loss) is not Tensor or loss.device.type in _FILLED:
        return loss
    mean: Tensor = Tensor._make_subclass(Mean, loss)
    return mean
