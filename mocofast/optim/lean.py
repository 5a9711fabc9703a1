"""Optimisers of PyTorch that do not load torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


class LeanOptimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer without its import of torch._dynamo, which takes a second.

    PyTorch hides four methods from torch.compile. The first call of such a method imports
    torch._dynamo, also where nothing is compiled. Here these methods run as they are until
    something else has imported torch._dynamo.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _unhidden(super().add_param_group)(param_group)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = _unhidden(super().state_dict)()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _unhidden(super().load_state_dict)(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _unhidden(super().zero_grad)(set_to_none)


def _unhidden(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method without torch._compile's wrapper, as long as nothing can compile."""
    function = getattr(method, "__func__", None)
    is_hidden = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    plain = getattr(function, "__wrapped__", None)
    if plain is None or not is_hidden or "torch._dynamo" in sys.modules:
        return method
    bound: Callable[..., Any] = plain.__get__(method.__self__)  # type: ignore[attr-defined]
    return bound
