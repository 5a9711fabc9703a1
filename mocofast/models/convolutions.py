"""Convolutions of an encoder in C, on a CPU."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mocofast_kernels.cpu_convolution import KINDS, LANES, convolves
from torch import Tensor, nn

from mocofast.models.tracing import is_traced, whole_call
from mocofast.ops.convolution import convolve


class CompiledConv2d(nn.Conv2d):
    """Conv2d, computed by `mocofast.ops.convolution.convolve` where possible.

    Weights, state-dict names and results (to rounding) are nn.Conv2d's. A weight with the attribute
    `master` is a copy of the master in another type (see `train.encoder_run`).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_traced(input):
            return whole_call(self, input)
        if torch.compiler.is_compiling():
            return super()._conv_forward(input, weight, bias)
        images, low = input, weight
        if torch.is_autocast_enabled("cpu") and input.device.type == "cpu":
            dtype = torch.get_autocast_dtype("cpu")  # autocast leaves float64 as it is
            images, low = (x if x.dtype == torch.float64 else x.to(dtype) for x in (images, low))
        result = convolve(
            images,
            low,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.dilation,
            getattr(weight, "master", None),
        )
        if result is None:
            return super()._conv_forward(input, weight, bias)
        return result


class PixelConv2d(CompiledConv2d):
    """A convolution whose inputs are no multiple of 16 channels, as the first one of an encoder.

    PyTorch computes. In bfloat16 on several threads C computes the weight's gradient.
    """


def compile_convolutions(module: nn.Module) -> None:
    """Makes Conv2d layers inside `module` CompiledConv2d layers, in place, where C can compute.

    C computes an nn.Conv2d (no subclass) of a single group, with zeros around the images, without a
    bias, of multiples of 16 channels. With other numbers of inputs it becomes a PixelConv2d.
    """
    for part in _compilable(module):
        part.__class__ = _class_of(part)


def _class_of(part: nn.Conv2d) -> type[CompiledConv2d]:
    return PixelConv2d if part.in_channels % LANES else CompiledConv2d


@contextmanager
def compiled_convolutions(module: nn.Module) -> Iterator[None]:
    """Compiles the convolutions of `module` inside the block, where the CPU computes in C.

    Weights are channels-last inside the block. Afterwards classes, memory and order of all weights
    are as before, with the values of a training inside the block: no saved file differs. Weights on
    GPUs and shards of weights stay as they are. Threads may evaluate an encoder at the same time:
    the last thread to leave the block restores.
    """
    if not any(map(convolves, KINDS)):
        yield
        return
    with _changing:
        # A weight that is a view of another parameter's memory has to stay in this memory.
        memory = Counter(p.untyped_storage().data_ptr() for p in module.parameters())
        parts: list[Any] = [
            part
            for part in (*_compilable(module), *filter(_blocks.__contains__, module.modules()))
            if type(part.weight) is nn.Parameter
            and part.weight.device.type == "cpu"
            and memory[part.weight.untyped_storage().data_ptr()] == 1
        ]
        weights = {part.weight for part in parts}
        for weight in weights.difference(_before):
            _before[weight] = weight.data
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        for part in parts:
            part.__class__ = _class_of(part)
        _blocks.update((*parts, *weights))
    try:
        yield
    finally:
        with _changing:
            for part in parts:
                if _is_last(part):
                    part.__class__ = nn.Conv2d
            for weight in weights:
                if _is_last(weight):
                    weight.data = _before.pop(weight).copy_(weight.data)


# Of all threads, guarded by the lock.
_changing = threading.Lock()
_blocks: Counter[Any] = Counter()  # the blocks of `compiled_convolutions` by layer and weight
_before: dict[Any, Tensor] = {}  # the weights outside of the blocks


def _is_last(part: Any) -> bool:
    """Counts a block less, and says whether the block was the last of a layer or weight."""
    _blocks[part] -= 1
    if _blocks[part]:
        return False
    del _blocks[part]
    return True


def _compilable(module: nn.Module) -> list[nn.Conv2d]:
    return [
        part
        for part in module.modules()
        if type(part) is nn.Conv2d
        and part.groups == 1
        and part.bias is None
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
        and not part.out_channels % LANES
    ]
