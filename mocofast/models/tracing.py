"""Layers that torch.fx takes as a whole, as it takes PyTorch's own layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def is_traced(value: Any) -> bool:
    """Returns whether torch.fx traces: the value has no numbers."""
    return isinstance(value, Proxy)


def whole_call(layer: nn.Module, *arguments: Any) -> Any:
    """Returns a call of the layer in the graph. The first argument is traced."""
    tracer = arguments[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})
