"""A ViT's forward and backward pass with our attention, and with torchvision's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.models.encoders import build_encoder
from mocofast_bench.timing import Call


def build_sides(arch: str, size: int, batch: int, bf16: bool) -> dict[str, Call]:
    """Returns {side: pass over the same random images, which returns the loss}.

    arch: a ViT of ours. size: of the images, in pixels. bf16: under autocast.
    """
    ours: Any = build_encoder(arch, size)(num_classes=128)
    theirs = copy.deepcopy(ours)
    for block in theirs.encoder.layers:
        width, heads = block.self_attention.out_proj.in_features, block.self_attention.num_heads
        block.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))

    def trained(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss: Tensor = network(images).float().square().mean()
        loss.backward()
        return loss.detach()

    return {"mocofast": lambda: trained(ours), "torchvision": lambda: trained(theirs)}
