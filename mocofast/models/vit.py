"""Vision Transformers of MoCo v3 (Chen et al. 2021, arXiv:2104.02057), built with torchvision."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.view_sizes import Size, height_width


class ViTSize(NamedTuple):
    """Hyper-parameters of a Vision Transformer."""

    patch_size: int  # in pixels
    num_layers: int
    num_heads: int
    hidden_dim: int


SIZES = {
    "vit_tiny": ViTSize(16, 12, 12, 192),  # solo-learn's for MoCo v3. DeiT's ViT-Ti has 3 heads
    "vit_small": ViTSize(16, 12, 12, 384),  # DeiT's ViT-S has 6 heads
    "vit_base": ViTSize(16, 12, 12, 768),
    "vit_large": ViTSize(16, 24, 16, 1024),
    "vit_huge": ViTSize(14, 32, 16, 1280),
    "vit_tiny_cifar": ViTSize(4, 6, 3, 192),  # half of DeiT's ViT-Ti, for images of 32 pixels
    "vit_micro_cifar": ViTSize(4, 4, 4, 64),  # for a CPU
}


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    Computes what torch.nn.MultiheadAttention computes, with its parameters, to rounding. Query, key
    and value are views of one product. MultiheadAttention copies the product into three tensors.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Takes over the parameters of `attention`: batch first, one width, biases.

        The names in state dicts stay the same.
        """
        super().__init__()
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj_weight = attention.in_proj_weight  # (3 D, D)
        self.in_proj_bias = attention.in_proj_bias  # (3 D,)
        self.out_proj = attention.out_proj

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Returns the output (N, L, D) for tokens x (N, L, D), and None in the place of weights.

        key, value: x, as torchvision's blocks pass. Not read.
        need_weights: False.
        """
        count, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (N, L, 3 D)
        packed = packed.view(count, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()  # (N, heads, L, D / heads)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).reshape(count, length, width)), None


def use_packed_attention(model: nn.Module) -> None:
    """Replaces the attention of every block of a torchvision VisionTransformer."""
    for block in model.encoder.layers:  # type: ignore[union-attr]
        block.self_attention = SelfAttention(block.self_attention)


def conv_of(old: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Returns a new convolution as `old`, for images of `channels` channels."""
    return nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )


def vision_transformer(
    name: str, image_size: Size, num_classes: int, channels: int = 3
) -> nn.Module:
    """Returns a torchvision VisionTransformer, initialised as in MoCo v3.

    The position embedding is `sincos_position_embedding` and frozen. The patch projection is random
    and frozen, which makes training stable (section 4.2 of the paper). Query, key and value
    projections are initialised as three layers.

    name: a key of `SIZES`.
    image_size: side of the images in pixels, or (height, width): multiples of the patch size.
    channels: of the images.
    """
    from mocofast.models.flexible_vit import FlexibleViT

    patch, layers, heads, width = SIZES[name]
    sides = height_width(image_size)
    model = FlexibleViT(max(sides), patch, layers, heads, width, 4 * width, num_classes=num_classes)
    model.set_image_size(image_size)
    if channels != 3:
        model.conv_proj = conv_of(model.conv_proj, channels)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            for part in module.in_proj_weight.chunk(3):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(module.in_proj_bias)
    nn.init.normal_(model.class_token, std=1e-6)
    # The patch projection is a linear layer on the pixels of a patch.
    nn.init.xavier_uniform_(model.conv_proj.weight.view(width, -1))
    nn.init.zeros_(model.conv_proj.bias)
    model.conv_proj.requires_grad_(False)
    position = sincos_position_embedding(sides[0] // patch, sides[1] // patch, width)
    model.encoder.pos_embedding = nn.Parameter(position, requires_grad=False)
    use_packed_attention(model)
    return model


class LayerScale(nn.Module):
    """Scales every channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239).

    x: (..., width). gamma: (width,), learned, from `value`.
    """

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def with_residual_options(model: nn.Module, drop_path: float, layer_scale: float) -> nn.Module:
    """Adds LayerScale and stochastic depth to the residual branches of a torchvision ViT, in place.

    drop_path: rate of the last block. Rates rise linearly from 0 in the first block, as in timm.
    layer_scale: first value of LayerScale. 0: none.
    """
    from torchvision.ops import StochasticDepth

    blocks = list(model.encoder.layers)  # type: ignore[union-attr, arg-type]
    for number, block in enumerate(blocks):
        rate = drop_path * number / max(1, len(blocks) - 1)
        for branch in ("dropout", "mlp"):
            old = getattr(block, branch)
            parts = list(old) if isinstance(old, nn.Sequential) else [old]
            if layer_scale:
                parts.append(LayerScale(block.ln_1.weight.numel(), layer_scale))
            if drop_path:
                parts.append(StochasticDepth(rate, "row"))
            setattr(block, branch, nn.Sequential(*parts))
    return model


def without_drop_path(model: nn.Module) -> None:
    """Turns stochastic depth off, in place: momentum encoders use all blocks."""
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # type: ignore[assignment]


def sincos_position_embedding(
    rows: int, columns: int, dim: int, temperature: float = 10000.0
) -> Tensor:
    """Returns position embeddings (1, 1 + rows * columns, dim): class token, then all patches.

    Class token: zeros. Patches: sine and cosine of the row, then sine and cosine of the column, for
    dim/4 frequencies from 1 down to about 1 / temperature.

    rows, columns: number of rows of patches, and of patches in a row.
    dim: a multiple of 4.
    """
    frequencies = temperature ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [torch.outer(place.flatten(), frequencies) for place in (row, column)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches]).unsqueeze(0)
