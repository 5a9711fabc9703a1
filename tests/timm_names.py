"""Names of a vision transformer's parameters in timm."""

from __future__ import annotations

import re

NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^encoder.pos_embedding$", "pos_embed"),
    (r"^heads.head", "head"),
    (r"^encoder.layers.encoder_layer_", "blocks."),
    (r"^encoder.ln", "norm"),
    (r"^conv_proj", "patch_embed.proj"),
    (r"ln_(\d)", r"norm\1"),
    (r"self_attention.in_proj_", "attn.qkv."),
    (r"self_attention.out_proj", "attn.proj"),
    (r"mlp.0", "mlp.fc1"),
    (r"mlp.3", "mlp.fc2"),
)


def timms(name: str) -> str:
    """Returns timm's name of a parameter of torchvision's ViT."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name
