"""Models sharded over the ranks by FSDP2 (engine.parallel fsdp).

A rank holds a part of every weight, of the momentum encoder's weights alike, and of the optimiser's
state. A block of an encoder has whole weights only while it computes. The optimiser steps and
averages on the parts.

Under bf16 the ranks exchange the weights of a ViT's blocks in bf16. LayerNorm then computes in
float32 from rounded weights. Blocks with other layers (BatchNorm), and weights outside the blocks,
travel in float32 and are converted by autocast. Gradients are summed in float32.
Source: Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mocofast.config import Config, ConfigError
from mocofast.device import short_name
from mocofast.methods.base import Method
from mocofast.models.recompute import blocks_of
from mocofast.models.vit import LayerScale
from mocofast.ops.local import is_dtensor, whole_tensor
from mocofast.step_parts import FORWARD
from mocofast.train.encoder_run import CONVERTED


def is_sharded(config: Config, world_size: int) -> bool:
    """Returns whether a run shards its model. One process has nothing to share."""
    return config.engine.parallel == "fsdp" and world_size > 1


def check_shardable(config: Config, method: Method, autocast: torch.autocast) -> None:
    """Raises ConfigError for settings that need whole weights on every rank."""
    if short_name(autocast) == "fp16":
        raise ConfigError(
            "train.precision: fp16 scales the loss, which sharded models do not know; "
            "--train.precision bf16 or fp32 works with --engine.parallel fsdp"
        )
    if config.optim.name == "lars":
        raise ConfigError(
            "optim.name: lars scales a weight by its norm, and a rank of --engine.parallel fsdp "
            "holds a part of the weight; sgd and adamw work"
        )
    if scalar := next((name for name, p in method.named_parameters() if p.dim() == 0), ""):
        raise ConfigError(
            f"engine.parallel: {config.model.method} learns a single number, {scalar}, of which "
            "fsdp makes no parts; --engine.parallel ddp works"
        )
    if config.augment.local_crops and method.joins_sizes:
        raise ConfigError(
            f"augment.local_crops: the head of {config.model.method} sees large and small views "
            "together, and fsdp runs whole encoders; --engine.parallel ddp works"
        )
    if method.writes_weights:
        raise ConfigError(
            f"engine.parallel: {config.model.method} writes weights in its forward pass, which "
            "fsdp would lose; --engine.parallel ddp works"
        )


def all_ranks(device: torch.device) -> DeviceMesh:
    """Returns the mesh of all ranks."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


class Sharding:
    """A method whose parameters are sharded over all ranks, in place.

    method: on the CPU, with equal weights on all ranks. Make the optimiser afterwards.
    device: of the parts.
    autocast: the precision of the forward passes.
    mesh: of all ranks. None makes one.
    """

    def __init__(
        self,
        method: Method,
        device: torch.device,
        autocast: torch.autocast,
        mesh: DeviceMesh | None = None,
    ) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

        self._method = method
        encoders = [name for name in FORWARD if isinstance(getattr(method, name, None), nn.Module)]
        self._plain = {name: _without_memory(getattr(method, name)) for name in encoders}
        for p in method.parameters():  # FSDP2 shards no other memory formats
            p.data = p.data.contiguous()
        mesh = mesh or all_ranks(device)
        full = MixedPrecisionPolicy(cast_forward_inputs=False)
        low = full
        if autocast._enabled:
            low = replace(full, param_dtype=autocast.fast_dtype, reduce_dtype=torch.float32)
        for name in encoders:
            for block in blocks_of(getattr(method, name)):
                may_be_low = low is not full and _may_be_low(block)
                fully_shard(block, mesh=mesh, mp_policy=low if may_be_low else full)
            fully_shard(getattr(method, name), mesh=mesh, mp_policy=full)
        fully_shard(method, mesh=mesh, mp_policy=full)
        method.to(device)  # buffers

    def whole(self, name: str = "encoder_q") -> nn.Module:
        """Returns a copy of an encoder with whole weights and the same buffers. A collective call.

        The caller drops the copy as soon as possible: it is what did not fit.
        """
        live = getattr(self._method, name)
        plain = copy.deepcopy(self._plain[name])
        weights = {path: whole_tensor(p.detach()) for path, p in live.named_parameters()}
        plain.load_state_dict(weights, strict=False, assign=True)
        for path, buffer in live.named_buffers():
            parent, _, last = path.rpartition(".")
            plain.get_submodule(parent)._buffers[last] = buffer
        return plain


def sharded_like(own: Tensor, whole: Tensor) -> Tensor:
    """Returns `whole`, the same on every rank, sharded as `own`, or itself for a plain `own`."""
    sharded: Any = own if is_dtensor(own) else None
    if sharded is None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.to(sharded.to_local().device)
    return distribute_tensor(on_device, sharded.device_mesh, sharded.placements, src_data_rank=None)


def load_model(method: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Loads a state dict of whole weights into a method, sharded or not. Raises RuntimeError."""
    own = method.state_dict()
    fitting = {
        name: sharded_like(own[name], value)
        if name in own and own[name].shape == value.shape
        else value
        for name, value in saved.items()
    }
    method.load_state_dict(fitting)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Loads a state dict of whole tensors into an optimiser of sharded or of plain parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            name: sharded_like(parameters[number], value)
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in entries.items()
        }
        for number, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _may_be_low(block: nn.Module) -> bool:
    """Prepares a block for weights in the autocast type. False: the block has other layers."""
    layers = [
        part for part in block.modules() if next(part.parameters(recurse=False), None) is not None
    ]
    if not all(type(layer) in (*CONVERTED, nn.LayerNorm, LayerScale) for layer in layers):
        return False
    for layer in layers:
        if isinstance(layer, nn.LayerNorm):
            layer.forward = partial(_layer_norm, layer)  # type: ignore[method-assign]
    return True


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Computes LayerNorm in float32, as autocast does on a GPU. (A CPU takes no bf16 weights.)"""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = layer.weight.float(), layer.bias.float()
        return F.layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)


def _without_memory(module: nn.Module) -> nn.Module:
    """Returns a copy of a module whose parameters have shapes and no values."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    empty |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, empty)


def empty_like_own(
    method: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[str, Tensor], Tensor]:
    """Returns what `parts.fill` reads into: tensors that are sharded as those of a run.

    The paths are those of a checkpoint: "model/NAME", "optimizer/state/NUMBER/NAME".
    """
    own = method.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def make(path: str, value: Tensor) -> Tensor:
        kind, _, name = path.partition("/")
        like = own.get(name) if kind == "model" else parameters[int(name.split("/")[1])]
        if like is not None and is_dtensor(like) and like.shape == value.shape:
            return torch.empty_like(like, dtype=value.dtype)
        return torch.empty(value.shape, dtype=value.dtype)

    return make
