"""Activation checkpointing changes memory and time, and no number."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mocofast import MoCo, cli
from mocofast.device import choose_autocast
from mocofast.models.encoders import build_encoder
from mocofast.models.recompute import recompute_blocks
from mocofast.optim import FusedSGD
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.engine import Engine

CPU = torch.device("cpu")


def gradients(encoder: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Returns gradients of two passes, whose random choices start at one seed."""
    torch.manual_seed(7)
    (encoder(images).square().sum() + encoder(2 * images).sum()).backward()
    return [p.grad for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("arch", "blocks", "options"),
    [
        ("resnet18_cifar", 8, {}),
        ("vit_tiny_cifar", 6, {"drop_path": 0.3, "layer_scale": 0.5}),
        ("timm/convnext_atto", 12, {"drop_path": 0.3}),
        ("timm/regnetx_002", 5, {}),
    ],
)
def test_gradients_and_running_statistics_are_equal_in_bits(
    arch: str, blocks: int, options: dict[str, Any]
) -> None:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = build_encoder(arch, 32, **options)(num_classes=5)
    saving = copy.deepcopy(plain)
    assert recompute_blocks(saving) == blocks
    images = torch.randn(4, 3, 32, 32)
    ours, theirs = gradients(saving, images), gradients(plain, images)
    assert len(ours) == len(theirs) > blocks
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    for name, value in plain.state_dict().items():  # BatchNorm moved once a pass
        assert torch.equal(saving.state_dict()[name], value), name


def test_fewer_activations_are_kept() -> None:
    def kept(encoder: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        ):
            encoder(torch.randn(4, 3, 32, 32))
        return sum(sizes)

    encoder = build_encoder("resnet18_cifar", 32)(num_classes=5)
    before = kept(encoder)
    recompute_blocks(encoder)
    assert kept(encoder) < 0.5 * before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_steps_of_the_engine_are_equal(mode: str, precision: str) -> None:
    def train(recompute: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = MoCo(build_encoder("resnet18_cifar", 16), dim=8, queue_size=32, bn_splits=2)
        if recompute:
            recompute_blocks(model.encoder_q)
        queries, keys = model.trained_pairs()
        optimizer = FusedSGD(queries, 0.1, ema=(keys, 0.9))
        autocast = choose_autocast(precision, CPU)
        engine = Engine(mode, model, optimizer, autocast, 1, 4, backend="aot_eager")
        for _ in range(2):
            views = tuple(torch.randn(4, 3, 16, 16) for _ in range(2))
            engine.step(views)
        return model.state_dict()

    ours, theirs = train(True), train(False)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


def test_a_run_says_and_resumes_with_either_setting(tmp_path: Path) -> None:
    run = ("--train.device", "cpu", "--data.workers", "0", "--model.queue_size", "300")
    words = ["pretrain", "digits", *run, "--knn.start", "false", "--knn.every", "0"]
    for name in ("true", "false"):
        folder = ("--train.dir", str(tmp_path / name), "--engine.checkpoint_activations", name)
        assert cli.main([*words, *folder, "--train.max_steps", "2"]) == 0
    ours, theirs = (load_checkpoint(tmp_path / name)["model"] for name in ("true", "false"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
