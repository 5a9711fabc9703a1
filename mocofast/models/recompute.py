"""Activation checkpointing: the blocks of an encoder keep their inputs, and compute twice.

Gradients stay equal. Running statistics of BatchNorm move once, and random choices (dropout,
stochastic depth) are made once.
Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mocofast.models.heads import head_names


def recompute_blocks(encoder: nn.Module) -> int:
    """Makes the blocks of an encoder compute again in the backward pass, in place.

    Blocks are the children of lists and sequences of modules (stages of a ResNet, layers of a ViT)
    that hold several layers. Of blocks inside blocks, the inner blocks are taken. An encoder
    without such lists: its own children, apart from heads.

    Returns the number of blocks, 0 for an encoder without blocks. State dicts stay as they are.
    """
    blocks = blocks_of(encoder)
    for block in blocks:
        block.forward = _Recomputed(block, block.forward)
    return len(blocks)


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """Returns the blocks of an encoder, in the order of its modules (see `recompute_blocks`)."""
    blocks = [block for block in _blocks(encoder) if not any(_blocks(block))]
    heads = {encoder.get_submodule(name) for name in head_names(encoder)}
    return blocks or [m for m in encoder.children() if _holds_layers(m) and m not in heads]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for parent in module.modules():
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and len(parent) > 1:
            for child in parent.children():
                # A sequence of layers is a stem or a branch of a block.
                if not isinstance(child, nn.Sequential) and _holds_layers(child):
                    yield child


def _holds_layers(module: nn.Module) -> bool:
    """Returns whether a module is a block: at least two layers with weights."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules()) > 1


class _Recomputed:
    """The forward pass of a block, computed again in the backward pass."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block, self.forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler separates buffers from what it repeats
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        # The engine runs encoders with other tensors in the place of weights (see encoder_run).
        weights = _tensors(self.block, "_parameters")

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._again(weights)

        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @contextlib.contextmanager
    def _again(self, weights: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
        """Inside the block, gives the weights of the first pass, and buffers that are copies."""
        buffers = _tensors(self.block, "_buffers")
        now = _tensors(self.block, "_parameters")
        try:
            for module, name, tensor in buffers:
                module._buffers[name] = tensor.clone()
            for module, name, tensor in weights:
                module._parameters[name] = tensor  # type: ignore[assignment]
            yield
        finally:
            for module, name, tensor in buffers:
                module._buffers[name] = tensor
            for module, name, tensor in now:
                module._parameters[name] = tensor  # type: ignore[assignment]


def _tensors(block: nn.Module, kind: str) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, tensor)
        for module in block.modules()
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    ]
