"""Learning rates by layer, and stochastic depth, for fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import VisionTransformer
from torchvision.ops import stochastic_depth

from mocofast.config import ConfigError, OptimConfig
from mocofast.optim.build import build_optimizer
from mocofast.optim.fused import FusedAdamW, FusedSGD

# Where the layers of encoders are that timm did not build, as timm's group_matcher says it.
_VIT = {
    "stem": r"^class_token|^conv_proj|^encoder\.pos_embedding",
    "blocks": [(r"^encoder\.layers\.encoder_layer_(\d+)", None), (r"^encoder\.ln", (99999,))],
}
_RESNET = {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)\.(\d+)"}
_UNDECAYED = ("class_token", "encoder.pos_embedding")


def optimizer_of(
    encoder: nn.Module, schedule: OptimConfig, layer_decay: float
) -> torch.optim.Optimizer:
    """Returns the optimiser of all weights of an encoder with a new head.

    layer_decay: the rate of layer i of L is rate x layer_decay^(L - i), where the head is layer L
        (`mocofast.optim.schedule.set_learning_rate` applies it). Weights of one dimension and
        position embeddings are not decayed then. 1: one rate, and the same decay everywhere.
    Raises ConfigError if layer_decay is not 1 and timm is not installed.
    """
    if layer_decay == 1:
        return build_optimizer(encoder.parameters(), schedule)
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError as error:
        raise ConfigError(
            f"finetune.layer_decay: needs timm ({error}); pip install timm, or --finetune."
            "layer_decay 1"
        ) from error
    described: Any = encoder
    if not hasattr(encoder, "group_matcher"):
        is_vit = isinstance(encoder, VisionTransformer)
        described = _Described(encoder, _VIT if is_vit else _RESNET)
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        described, schedule.weight_decay, _UNDECAYED, layer_decay=layer_decay
    )
    if schedule.name == "adamw":
        return FusedAdamW(groups, schedule.lr, schedule.betas)
    return FusedSGD(groups, schedule.lr, schedule.momentum)


class _Described:
    """The parameters of an encoder, and where its layers are, in timm's words."""

    def __init__(self, encoder: nn.Module, layers: dict[str, Any]) -> None:
        self.named_parameters, self._layers = encoder.named_parameters, layers

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return self._layers


def add_drop_path(encoder: nn.Module, probability: float) -> list[RemovableHandle]:
    """Makes the blocks of a ViT skip their branches at random in train mode.

    (Huang et al. 2016, arXiv:1603.09382.) Block i of L skips each of its two branches with
    probability x i / (L - 1), of every image by itself.
    Returns the hooks. State dicts keep their names.
    Raises ConfigError for an encoder that is no Vision Transformer of torchvision, ours or timm.
    """
    if isinstance(encoder, VisionTransformer):
        blocks = list(encoder.encoder.layers)
        branches = [(block.dropout, block.mlp) for block in blocks]
    else:
        blocks = [part for part in encoder.modules() if hasattr(part, "drop_path1")]
        branches = [(block.drop_path1, block.drop_path2) for block in blocks]
    if not blocks:
        raise ConfigError(
            f"finetune.drop_path: expected 0 for {type(encoder).__name__}, got {probability}: "
            "only blocks of Vision Transformers can be skipped"
        )
    handles = []
    for number, parts in enumerate(branches):
        share = probability * number / max(1, len(branches) - 1)
        handles += [part.register_forward_hook(partial(_skip, share)) for part in parts]
    return handles


def _skip(share: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return stochastic_depth(output, share, "row", module.training)
