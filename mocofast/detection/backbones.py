"""Encoders as backbones: stages, feature pyramids, dilation, and BatchNorm of several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from mocofast.config import ConfigError
from mocofast.distributed import rank_and_world_size
from mocofast.evaluate.features import evaluating
from mocofast.models.batch_norm import replace_batch_norms


def stages(encoder: nn.Module) -> list[str]:
    """Returns the names of the stages of a ResNet: layer1, layer2, ..."""
    return [name for name, _ in encoder.named_children() if name.startswith("layer")]


def trunk(encoder: nn.Module, names: dict[str, str]) -> nn.Module:
    """Returns the encoder up to the last named stage. names: {stage: name of the output}."""
    return IntermediateLayerGetter(encoder, names)


@torch.no_grad()
def shapes(body: nn.Module, channels: int, side: int = 256) -> dict[str, tuple[int, int]]:
    """Returns (channels, stride) of every output of a body of stages. side: of a test image."""
    with evaluating(body):
        maps = body(torch.zeros(1, channels, side, side))
    return {name: (x.shape[1], side // x.shape[2]) for name, x in maps.items()}


def pyramid(
    encoder: nn.Module,
    channels: int,
    width: int,
    first: int,
    extra: ExtraFPNBlock | None,
    norm: bool,
) -> BackboneWithFPN:
    """Returns a feature pyramid (Lin et al. 2017, arXiv:1612.03144) on the stages of an encoder.

    first: number of the first stage to use, from 0. width: channels of the levels.
    extra: makes further levels. norm: BatchNorm after the convolutions of the pyramid.
    """
    used = {name: str(i) for i, name in enumerate(stages(encoder)[first:])}
    inputs = [c for c, _ in shapes(trunk(encoder, used), channels, 64).values()]
    norm_layer = nn.BatchNorm2d if norm else None
    return BackboneWithFPN(encoder, used, inputs, width, extra, norm_layer)


def dilate(encoder: nn.Module, channels: int, stride: int) -> None:
    """Lowers the stride of the last stages to `stride`, by dilation (arXiv:1706.05587), in place.

    Every stride-th value of the new maps equals the value of the old maps.
    Raises ConfigError for an encoder whose first stage has a larger stride already.
    """
    names = stages(encoder)
    strides = shapes(trunk(encoder, {n: n for n in names}), channels)
    if strides[names[0]][1] > stride:
        raise ConfigError(
            f"model.stride: expected at least {strides[names[0]][1]}, the stride of the first "
            f"stage, got {stride}"
        )
    rate = 1
    for name in names:
        before, rate = rate, max(1, strides[name][1] // stride)
        for part in getattr(encoder, name).modules():
            if isinstance(part, nn.Conv2d):
                # A convolution with a stride reads the map before the stride.
                strided = max(part.stride) > 1
                _dilate(part, before if strided else rate, rate > before)


def _dilate(convolution: nn.Conv2d, rate: int, keep_size: bool) -> None:
    """Dilates a convolution. keep_size: the stride becomes 1."""
    if keep_size:
        convolution.stride = (1, 1)
    if convolution.kernel_size[0] > 1 and rate > 1:
        side = convolution.kernel_size[0] // 2 * rate
        convolution.dilation, convolution.padding = (rate, rate), (side, side)


def freeze_norms(module: nn.Module) -> None:
    """Replaces every BatchNorm2d by a layer with fixed statistics and weights, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)


class UnevenSyncBatchNorm(_BatchNorm):
    """BatchNorm with statistics over all ranks, whose batches may differ in size.

    Regions and sizes of images differ between ranks, unlike in pretraining. Weights, running
    statistics and state-dict names are BatchNorm's. With one process, or in eval mode, the layer is
    an ordinary BatchNorm. In train mode all ranks call forward and backward together.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or rank_and_world_size()[1] == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        over = [dim for dim in range(input.dim()) if dim != 1]
        wide = input if input.dtype == torch.float64 else input.float()
        own = wide.new_tensor([input.numel() / input.shape[1]])
        sums = all_reduce(torch.cat([wide.sum(over), own]), dist.ReduceOp.SUM)
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        view = (1, -1, *[1] * (input.dim() - 2))
        centred = wide - mean.view(view)
        variance = all_reduce(centred.square().sum(over), dist.ReduceOp.SUM) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(view) + self.bias.view(view)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be (N, C, ...): got shape {tuple(input.shape)}")


def sync_norms(module: nn.Module) -> None:
    """Replaces every BatchNorm by BatchNorm over all ranks, in place.

    Keeps weights and statistics.
    """

    def make(old: _BatchNorm) -> UnevenSyncBatchNorm:
        return UnevenSyncBatchNorm(old.num_features, old.eps, old.momentum)

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    replace_batch_norms(module, lambda child: isinstance(child, kinds), make)


def interpolated(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns maps (N, C, h, w) in the size (H, W), bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
