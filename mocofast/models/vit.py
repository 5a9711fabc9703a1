"""The Vision Transformers of MoCo v3 (Chen et al. 2021, arXiv:2104.02057), as configurations of torchvision's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class ViTSize(NamedTuple):
    """What makes one of another."""

    patch_size: int  # in pixels
    num_layers: int
    num_heads: int
    hidden_dim: int


SIZES = {
    "vit_small": ViTSize(16, 12, 12, 384),  # 12 heads, where DeiT's ViT-S has 6
    "vit_base": ViTSize(16, 12, 12, 768),
    "vit_tiny_cifar": ViTSize(4, 6, 3, 192),  # half of DeiT's ViT-Ti, for images of 32 pixels
    "vit_micro_cifar": ViTSize(4, 4, 4, 64),  # for a CPU
}


def vision_transformer(name: str, image_size: int, num_classes: int) -> nn.Module:
    """One of `SIZES`: torchvision's VisionTransformer with its names, started as MoCo v3 starts it.

    The position embedding is `sincos_position_embedding` and fixed. The projection of patches stays as it was drawn,
    which the paper found to make training stable (section 4.2). Query, key and value projections are initialised as
    three layers, not as one. image_size: a multiple of the patch size, in pixels.
    """
    from torchvision.models import VisionTransformer

    patch, layers, heads, width = SIZES[name]
    model = VisionTransformer(
        image_size, patch, layers, heads, width, 4 * width, num_classes=num_classes
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            for part in module.in_proj_weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.in_proj_bias)
    nn.init.normal_(model.class_token, std=1e-6)
    nn.init.xavier_uniform_(
        model.conv_proj.weight.view(width, -1)
    )  # a linear layer on the pixels of a patch
    nn.init.zeros_(model.conv_proj.bias)
    model.conv_proj.requires_grad_(False)
    position = sincos_position_embedding(image_size // patch, width)
    model.encoder.pos_embedding = nn.Parameter(position, requires_grad=False)
    return model


def sincos_position_embedding(side: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """(1, 1 + side^2, dim): zeros for the class token, then sines and cosines of every patch's row and column.

    dim: a multiple of 4; each quarter holds dim/4 frequencies from 1 down to about 1 / temperature.
    """
    frequencies = temperature ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [torch.outer(place.flatten(), frequencies) for place in (row, column)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)
