"""The models: torchvision's detectors and segmentation networks on an encoder of ours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from mocofast.detection.backbones import (
    dilate,
    freeze_norms,
    interpolated,
    pyramid,
    shapes,
    stages,
    sync_norms,
    trunk,
)
from mocofast.detection.options import DetectConfig, SegmentConfig
from mocofast.detection.start import Start, encoder_of

RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


def _encoder(start: Start, norm: str) -> nn.Module:
    """Returns the encoder of a start, with frozen BatchNorm if asked for."""
    encoder = encoder_of(start)
    if norm == "frozen":
        freeze_norms(encoder)
    return encoder


def detector(config: DetectConfig, start: Start, classes: int) -> nn.Module:
    """Builds a detector of torchvision.

    classes: number of classes without the background.
    The model takes a list of images (C, H, W) float32, 0 to 1, and a list of targets, as
    torchvision's detectors do, and resizes and normalises the images.
    """
    m, data = config.model, config.data
    encoder = _encoder(start, m.norm)
    shared: dict[str, Any] = {
        "min_size": data.sizes,
        "max_size": data.max_size,
        "image_mean": start.mean,
        "image_std": start.std,
    }
    builder = {"retinanet": _retinanet, "faster_rcnn": _rcnn, "mask_rcnn": _rcnn}.get(m.name, _c4)
    model = builder(config, encoder, start.channels, classes, shared)
    sync_norms(model)
    return model


def _retinanet(
    config: DetectConfig, encoder: nn.Module, channels: int, classes: int, shared: dict[str, Any]
) -> nn.Module:
    """RetinaNet (Lin et al. 2017, arXiv:1708.02002) on the stages from the second on."""
    m = config.model
    extra = LastLevelP6P7(m.width, m.width)
    backbone = pyramid(encoder, channels, m.width, 1, extra, m.norm == "sync")
    levels = len(stages(encoder)) - 1 + 2
    octave = [2 ** (i / 3) for i in range(3)]
    sizes = [tuple(int(m.anchor * 2**level * o) for o in octave) for level in range(levels)]
    anchors = AnchorGenerator(tuple(sizes), (RATIOS,) * levels)
    # BatchNorm would mix the statistics of the levels, which share the head.
    groups = next(
        g for g in (32, 16, 8, 4, 2, 1) if (m.width % g == 0 and m.width >= 8 * g) or g == 1
    )
    norm = partial(nn.GroupNorm, groups)
    # torchvision counts the background as class 0, although no score of it is trained.
    head = RetinaNetHead(m.width, anchors.num_anchors_per_location()[0], classes + 1, norm)
    return RetinaNet(backbone, classes + 1, anchor_generator=anchors, head=head, **shared)


def _rcnn(
    config: DetectConfig, encoder: nn.Module, channels: int, classes: int, shared: dict[str, Any]
) -> nn.Module:
    """Faster R-CNN and Mask R-CNN on a feature pyramid (arXiv:1506.01497, arXiv:1703.06870)."""
    m = config.model
    backbone = pyramid(encoder, channels, m.width, 0, LastLevelMaxPool(), m.norm == "sync")
    levels = len(stages(encoder))
    anchors = AnchorGenerator(
        tuple((m.anchor * 2**level,) for level in range(levels + 1)), (RATIOS,) * (levels + 1)
    )
    names = [str(level) for level in range(levels)]
    hidden = 4 * m.width
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "box_head": TwoMLPHead(m.width * 7 * 7, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
        "box_batch_size_per_image": m.rois,
        **shared,
    }
    if m.name == "faster_rcnn":
        return FasterRCNN(backbone, **parts)
    norm = nn.BatchNorm2d if m.norm == "sync" else None
    return MaskRCNN(
        backbone,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(m.width, (m.width,) * 4, 1, norm),
        mask_predictor=MaskRCNNPredictor(m.width, m.width, classes + 1),
        **parts,
    )


class _C4Head(nn.Module):
    """The last stage of the encoder, then BatchNorm: MoCo's head of R50-C4.

    The configuration of facebookresearch/moco (detection/train_net.py) adds the BatchNorm, since
    the scales of pretrained features differ from the scales of supervised features.
    Input: regions (R, C, 14, 14). Output: (R, C2, 7, 7), or their means (R, C2) for boxes.
    """

    def __init__(self, stage: nn.Module, norm: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.stage, self.norm, self.pooled = stage, norm, pooled

    def forward(self, regions: Tensor) -> Tensor:
        x = self.norm(self.stage(regions))
        return x.mean((2, 3)) if self.pooled else x


class _C4Body(nn.Module):
    """The stages of the encoder but the last: a single map."""

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.body(images)
        return maps


def _c4(
    config: DetectConfig, encoder: nn.Module, channels: int, classes: int, shared: dict[str, Any]
) -> nn.Module:
    """Faster R-CNN and Mask R-CNN with R50-C4, as facebookresearch/moco configures detectron2."""
    m = config.model
    *_, last_but_one, last = stages(encoder)
    outputs = shapes(trunk(encoder, {last_but_one: "0", last: "1"}), channels, 64)
    stage = getattr(encoder, last)
    body = _C4Body(trunk(encoder, {last_but_one: "0"}), outputs["0"][0])
    width = outputs["1"][0]
    norm = nn.BatchNorm2d(width) if m.norm == "sync" else nn.Identity()
    anchors = AnchorGenerator((tuple(m.anchor * 2**i for i in range(5)),), (RATIOS,))
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        # detectron2's numbers of proposals for C4
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 0),
        "box_head": _C4Head(stage, norm, True),
        "box_predictor": FastRCNNPredictor(width, classes + 1),
        "box_batch_size_per_image": m.rois,
        **shared,
    }
    if m.name == "faster_rcnn_c4":
        return FasterRCNN(body, **parts)
    return MaskRCNN(
        body,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 0),
        mask_head=_C4Head(stage, norm, False),  # the same layers, as in detectron2
        mask_predictor=MaskRCNNPredictor(width, m.width, classes + 1),
        **parts,
    )


class Segmenter(nn.Module):
    """A network that labels every pixel: FCN (arXiv:1411.4038) or DeepLabV3 (arXiv:1706.05587).

    Input: images (N, C, H, W) float32, 0 to 1. Output: logits (N, classes + 1, H, W), of the
    background and the classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: SegmentConfig, start: Start, classes: int) -> None:
        super().__init__()
        m = config.model
        encoder = _encoder(start, m.norm)
        dilate(encoder, start.channels, m.stride)
        last = stages(encoder)[-1]
        self.backbone = trunk(encoder, {last: "out"})
        width = shapes(self.backbone, start.channels)["out"][0]
        rates = [round(rate * 16 / m.stride) for rate in (6, 12, 18)]  # arXiv:1706.05587, sec. 4
        heads = {"fcn": FCNHead, "deeplabv3": DeepLabHead}
        arguments = (rates,) if m.name == "deeplabv3" else ()
        self.classifier = heads[m.name](width, classes + 1, *arguments)
        self.register_buffer("mean", torch.tensor(start.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(start.std).view(-1, 1, 1), persistent=False)
        sync_norms(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone((images - self.mean) / self.std)["out"]
        size = (images.shape[2], images.shape[3])
        return interpolated(self.classifier(maps).float(), size)
