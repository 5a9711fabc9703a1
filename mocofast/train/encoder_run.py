"""How the engine runs an encoder in training: compiled, and on low-precision copies of its weights.

The copies are called shadows. The optimiser writes them when it updates the weights.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mocofast.models.convolutions import CompiledConv2d, PixelConv2d
from mocofast.models.sizes import ManySizes
from mocofast.models.vit import SelfAttention

Normalize = Callable[[Tensor], Tensor]
# Runs an encoder on images, with given tensors in the place of some weights.
RunWith = Callable[..., Tensor]

# Modules whose weights autocast always converts, and the names of these weights.
CONVERTED = (
    nn.Conv1d,
    nn.Conv2d,
    CompiledConv2d,
    PixelConv2d,
    nn.Linear,
    NonDynamicallyQuantizableLinear,
    nn.MultiheadAttention,
    SelfAttention,
)
_WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")


def make_shadows(
    encoder: nn.Module, autocast: torch.autocast
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Copies, in the autocast type, the weights that autocast would convert.

    Returns {path: (weight, copy)}, empty if autocast is off.
    """
    if not autocast._enabled:
        return {}
    return {
        f"{path}.{name}".lstrip("."): (weight, weight.detach().to(autocast.fast_dtype))
        for path, module in encoder.named_modules()
        if type(module) in CONVERTED
        for name, weight in module.named_parameters(recurse=False)
        if name in _WEIGHTS and weight.dtype == torch.float32
    }


def encoder_run(
    name: str,
    encoder: nn.Module,
    normalize: Normalize,
    shadows: Mapping[str, tuple[nn.Parameter, Tensor]],
    images_per_batch: int,
    backend: str | Callable[..., Any] | None,
    *,
    in_place: bool,
) -> Callable[..., Tensor]:
    """Returns a function that runs an encoder on images (N, C, S, S), pixels or normalised.

    The function takes a tensor for every size of images, as `mocofast.models.sizes.encode`.

    name: "encoder_q" or "encoder_k".
    normalize: normalises uint8 images.
    shadows: the copies of `make_shadows`, which take the places of the weights.
    images_per_batch: N of a full micro-batch. Only multiples of it run compiled.
    backend: torch.compile's backend, or None.
    in_place: add the gradient of a shadow to an existing gradient of the weight directly.
    """

    @functools.cache
    def eager_for(sizes: int) -> RunWith:
        return _call_of_its_own(name, encoder, normalize, sizes)

    @functools.cache
    def compiled_for(*shapes: torch.Size) -> RunWith:
        assert backend is not None
        call = _call_of_its_own(name, encoder, normalize, len(shapes))
        return torch.compile(call, backend=backend, dynamic=False)

    def run(*images: Tensor) -> Tensor:
        tracked = torch.is_grad_enabled()
        weights = {
            path: _shadowed(weight, shadow, in_place)
            if tracked and weight.requires_grad
            else shadow
            for path, (weight, shadow) in shadows.items()
        }
        if backend is None or any(len(same) % images_per_batch for same in images):
            return eager_for(len(images))(weights, *images)
        return compiled_for(*(same.shape for same in images))(weights, *images)

    return run


def _call_of_its_own(name: str, encoder: nn.Module, normalize: Normalize, sizes: int) -> RunWith:
    """Returns a function that calls the encoder, with a code object of its own.

    sizes: number of sizes of images.

    torch.compile keeps its results by code object, and a limited number of results. With one code
    object the encoders of all engines of a process, and views of all sizes, would share the limit,
    and then run uncompiled.
    """
    module, prefix = (encoder, "") if sizes == 1 else (ManySizes(encoder), "encoder.")

    def run(weights: dict[str, Tensor], *images: Tensor) -> Tensor:
        given = {prefix + path: weight for path, weight in weights.items()}
        return functional_call(module, given, tuple(normalize(same) for same in images))

    code = run.__code__.replace(co_name=f"run_{name}")
    return types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)


def _shadowed(weight: nn.Parameter, shadow: Tensor, in_place: bool) -> Tensor:
    """Returns the shadow, whose gradient goes to the weight.

    The attribute `master` is for operators with a gradient of the weight of their own.
    """
    shadowed: Tensor = _Shadow.apply(weight, shadow, in_place)
    if not in_place:
        shadowed.master = weight  # type: ignore[attr-defined]
    return shadowed


class _Shadow(torch.autograd.Function):
    """Puts a low-precision copy in the place of a weight. The weight gets the gradient.

    in_place: add to an existing gradient directly, in one launch instead of a conversion and an
        addition. Hooks on the weight, as of DistributedDataParallel, would not see the gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor, in_place: bool) -> Tensor:
        ctx.weight, ctx.in_place = weight, in_place
        return shadow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.in_place and ctx.weight.grad is not None:
            ctx.weight.grad.add_(grad)
            return None, None, None
        return grad, None, None  # autograd converts it to the weight's type
