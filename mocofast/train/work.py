"""The work of an encoder's layers: operations and bytes."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocofast.view_sizes import Size, height_width


class Work(NamedTuple):
    """Work of a layer."""

    operations: int  # a multiply-add counts as two
    bytes: int


def encoder_work(
    encoder: nn.Module, images: int, size: Size, autocast: torch.autocast, channels: int = 3
) -> tuple[list[Work], list[Work]]:
    """Returns the work of all layers in a forward pass, and in a backward pass (if trained).

    Nothing is computed. The encoder does not change.

    images: number of images of `size` with `channels` channels.
    """
    # In eval mode layers move the same bytes, and do not exchange statistics with other ranks.
    plain = copy.deepcopy(encoder).eval()
    device = next(plain.parameters()).device
    with FakeTensorMode() as fake, Layers() as layers, autocast:
        tensors: dict[str, Tensor] = {
            name: fake.from_tensor(tensor)
            for name, tensor in plain.state_dict(keep_vars=True).items()
        }
        given = torch.empty(images, channels, *height_width(size), device=device)
        given = given.to(memory_format=torch.channels_last)
        output = functional_call(plain, tensors, (given,))
        forward, layers.work = layers.work, []
        trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
        if trained:
            torch.autograd.grad(output, trained, torch.empty_like(output), allow_unused=True)
    return forward, layers.work


class Layers(TorchDispatchMode):
    """Records the work of every convolution, matrix product, attention and normalisation."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton

        super().__init__()
        self.work: list[Work] = []
        self._counts = flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Unlike FlopCounterMode, which imports torch._dynamo at the first operator: .9 s.
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = self._counts.get(function.overloadpacket)
        if count is not None or "_norm" in str(function):
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)
            ]
            moved = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
            self.work.append(Work(count(*args, **kwargs, out_val=result) if count else 0, moved))
        return result
