"""Detectors and segmentation networks: they hold the checkpoint's weights, train, and dilate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn

from mocofast.config import ConfigError
from mocofast.detection.backbones import UnevenSyncBatchNorm, dilate, stages, trunk
from mocofast.detection.models import Segmenter, detector
from mocofast.detection.optim import learning_rate, optimizer_of
from mocofast.detection.options import (
    DetectConfig,
    DetectData,
    DetectModel,
    SegmentConfig,
    SegmentModel,
    StartOptions,
    TaskOptim,
)
from mocofast.detection.sets import AnnotatedSet
from mocofast.detection.start import Start, encoder_of, find_start
from mocofast.detection.tasks import evaluate
from mocofast.models.encoders import build_encoder

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def start_of(arch: str, channels: int = 3) -> Start:
    """Returns a start with weights and statistics that differ from new ones."""
    torch.manual_seed(1)
    weights = build_encoder(arch, channels=channels)(num_classes=1).state_dict()
    for name, value in weights.items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    return Start(weights, arch, channels, (0.5,), (0.25,))


def small(name: str, norm: str = "sync") -> DetectConfig:
    """Returns a detector of few weights, for images of 64 pixels."""
    model = DetectModel(name=name, norm=norm, width=16, anchor=8, rois=16)
    return DetectConfig(model=model, data=DetectData(sizes=(64,), val_size=64))


def losses_of(model: nn.Module, channels: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images = [torch.rand(channels, 64, 64), torch.rand(channels, 48, 64)]
    boxes = torch.tensor([[4.0, 4, 30, 30], [20, 10, 60, 40]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 4:30, 4:30] = masks[1, 10:40, 20:60] = 1
    labels = torch.tensor([1, 2])
    targets = [
        {"boxes": boxes, "labels": labels, "masks": masks},
        {"boxes": boxes[:1], "labels": labels[:1], "masks": masks[:1, :48]},
    ]
    found: dict[str, Tensor] = model(images, targets)
    return found


@pytest.mark.parametrize(
    ("name", "arch", "norm", "channels"),
    [
        ("faster_rcnn", "resnet18", "sync", 3),
        ("faster_rcnn", "resnet_tiny", "frozen", 1),
        ("faster_rcnn_c4", "resnet18", "sync", 3),
        ("faster_rcnn_c4", "resnet50", "frozen", 3),
        ("mask_rcnn", "resnet_tiny", "sync", 3),
        ("mask_rcnn_c4", "resnet18", "sync", 3),
        ("retinanet", "resnet34", "sync", 3),
        ("retinanet", "resnet18_cifar", "frozen", 3),
    ],
)
def test_detectors_hold_the_weights_and_train_them(
    name: str, arch: str, norm: str, channels: int
) -> None:
    start = start_of(arch, channels)
    assert start.weights is not None
    model = detector(small(name, norm), start, classes=2)
    state = model.state_dict()
    for own, value in start.weights.items():
        if norm == "frozen" and own.endswith("num_batches_tracked"):
            continue
        matches = [key for key in state if key.endswith(f".{own}") or f"stage.{own[7:]}" in key]
        assert any(torch.equal(state[key], value) for key in matches), own
    model.train()
    losses = losses_of(model, channels)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert ("loss_mask" in losses) == name.startswith("mask")
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    after = model.state_dict()
    moved = [k for k in after if "backbone" in k and k.endswith("running_mean")]
    moved = [k for k in moved if not torch.equal(after[k], state[k])]
    assert not moved or norm == "sync"
    model.eval()
    with torch.no_grad():
        (found,) = model([torch.rand(channels, 50, 70)])
    assert found["boxes"].shape == (len(found["scores"]), 4)
    if name.startswith("mask"):
        assert found["masks"].shape == (len(found["scores"]), 1, 50, 70)


def test_c4_has_the_extra_batch_norm_of_moco() -> None:
    model: Any = detector(small("mask_rcnn_c4"), start_of("resnet18"), classes=2)
    head = model.roi_heads.box_head
    assert isinstance(head.norm, UnevenSyncBatchNorm) and head.norm.num_features == 512
    assert model.roi_heads.mask_head.stage is head.stage
    assert "layer4" not in dict(model.backbone.body.named_children())
    regions = torch.rand(5, 256, 14, 14)
    torch.testing.assert_close(head(regions).shape, torch.Size([5, 512]))
    frozen: Any = detector(small("faster_rcnn_c4", "frozen"), start_of("resnet18"), classes=2)
    assert isinstance(frozen.roi_heads.box_head.norm, nn.Identity)


@pytest.mark.parametrize(
    ("arch", "stride"), [("resnet18", 8), ("resnet50", 16), ("resnet_tiny", 4), ("resnet34", 4)]
)
def test_a_dilated_encoder_computes_the_old_values_and_those_between(
    arch: str, stride: int
) -> None:
    images = torch.rand(1, 3, 64, 96)
    encoder = encoder_of(start_of(arch)).eval()
    last = {stages(encoder)[-1]: "out"}
    with torch.no_grad():
        plain = trunk(encoder, last)(images)["out"]
        dilate(encoder, 3, stride)
        dense = trunk(encoder, last)(images)["out"]
    step = dense.shape[2] // plain.shape[2]
    assert dense.shape[2] == 64 // stride
    torch.testing.assert_close(dense[:, :, ::step, ::step], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fcn", "deeplabv3"])
def test_segmentation_networks_normalise_and_label_every_pixel(name: str) -> None:
    start = start_of("resnet18")
    model = Segmenter(SegmentConfig(model=SegmentModel(name=name, stride=8)), start, classes=3)
    model.eval()
    images = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        logits = model(images)
        maps = model.backbone((images - 0.5) / 0.25)["out"]
        expected = model.classifier(maps)
    assert logits.shape == (2, 4, 40, 56) and maps.shape[2:] == (5, 7)
    expected = nn.functional.interpolate(expected, (40, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)


def test_other_encoders_and_starts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"needs a ResNet .* got vit_small"):
        encoder_of(Start(None, "vit_small", 3, *IMAGENET))
    with pytest.raises(ConfigError, match="1 or 3 channels, got 5"):
        encoder_of(Start(None, "resnet18", 5, *IMAGENET))
    with pytest.raises(FileNotFoundError, match="did you mean 'scratch'"):
        find_start(StartOptions(init="scrach"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"resnet18-f37072fd\.pth in .*TORCH_HOME"):
        find_start(StartOptions(init="imagenet", arch="resnet18"))
    with pytest.raises(ConfigError, match="no weights of resnet_tiny"):
        find_start(StartOptions(init="imagenet", arch="resnet_tiny"))
    with pytest.raises(ConfigError, match=r"model\.stride: expected at least 4"):
        dilate(encoder_of(start_of("resnet18")), 3, 2)


def test_imagenet_weights_are_found_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = build_encoder("resnet18")(num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    start = find_start(StartOptions(init="imagenet", arch="resnet18"))
    loaded = encoder_of(start).state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])


def test_the_rate_follows_the_schedule() -> None:
    optim = TaskOptim(lr=0.02, lr_per=16, warmup_steps=10)
    rates = [learning_rate(optim, 8, step, 1000) for step in (0, 9, 700, 750, 916, 917)]
    assert rates == pytest.approx([0.001, 0.01, 0.01, 0.001, 0.001, 0.0001])
    optim = TaskOptim(lr=0.1, lr_per=0, schedule="cosine", warmup_steps=0)
    assert [learning_rate(optim, 8, s, 100) for s in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0])
    groups = optimizer_of(detector(small("retinanet"), start_of("resnet18"), 2), optim).param_groups
    assert [g["weight_decay"] for g in groups] == [1e-4, 0.0]
    assert sum(p.numel() for p in groups[1]["params"]) == 9600 + 2 * 6 * 16


def batches() -> list[Tensor]:
    """Batches of two ranks, of different sizes."""
    torch.manual_seed(0)
    return [torch.randn(5, 4, 3, 2, dtype=torch.float64), 3 + torch.randn(2, 4, 6, 1).double()]


def normalised(layer: nn.Module, batch: Tensor, whole: int) -> dict[str, Tensor]:
    """Returns output, gradients and statistics for a loss that is a mean over all values."""
    x = batch.clone().requires_grad_()
    y = layer(x)
    (y.sin() * torch.linspace(-1, 2, 4).view(1, 4, 1, 1)).sum().div(whole).backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}} | {
        n: b.clone() for n, b in layer.named_buffers()
    }


def on_a_rank(rank: int) -> dict[str, Tensor]:
    layer = UnevenSyncBatchNorm(4).double()
    return normalised(layer, batches()[rank], 168)


def test_batch_norm_over_ranks_of_different_sizes_equals_the_whole_batch() -> None:
    got = on_ranks(on_a_rank)
    # As one batch of single pixels: (42, 4, 1, 1).
    flat = [b.permute(0, 2, 3, 1).reshape(-1, 4, 1, 1) for b in batches()]
    expected = normalised(nn.BatchNorm2d(4).double(), torch.cat(flat), 168)
    for name in ("y", "x"):
        ranks = [part[name].permute(0, 2, 3, 1).reshape(-1, 4, 1, 1) for part in got]
        torch.testing.assert_close(torch.cat(ranks), expected[name], rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):  # of all ranks together
        total = sum(part[name] for part in got)
        torch.testing.assert_close(total, expected[name], rtol=1e-5, atol=1e-6)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(got[1][name], expected[name], rtol=1e-5, atol=1e-6)


class Numbered:
    """A reader of five images, of which the second cannot be read. A truth is a number."""

    images = AnnotatedSet([None] * 5, ())  # type: ignore[list-item]

    def read(self, index: int) -> tuple[Tensor, Any] | None:
        return None if index == 1 else (torch.zeros(1, 2, 2), index)


class Recorded:
    """A task whose figures are the truths in the order in which they are scored."""

    def predict(self, *_: Any) -> None: ...

    def pair(self, truth: int, *_: Any) -> tuple[int, None]:
        return truth, None

    def score(self, classes: tuple[str, ...], pairs: list[Any]) -> list[int]:
        return [truth for truth, _ in pairs]


def order_of_scores(rank: int) -> Any:
    cpu, stub = torch.device("cpu"), (Recorded(), nn.Identity(), Numbered())
    return evaluate(*stub, 1, cpu, lambda: False)  # type: ignore[arg-type]


def test_ranks_score_images_in_order_with_one_that_cannot_be_read() -> None:
    assert on_ranks(order_of_scores) == [[0, 2, 3, 4]] * 2
