"""Encoders that timm builds, and encoders of functions of the user."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mocofast import MoCo
from mocofast.config import ConfigError
from mocofast.evaluate.features import evaluating
from mocofast.interop import backbone_state_dict
from mocofast.models.encoders import build_encoder, features, head_name
from mocofast.models.heads import pooled, replace_head

MODULE = """
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

class Wide(nn.Module):
    def __init__(self, num_classes, image_size, channels, pair=False):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(channels, 6, 3), nn.Linear(6, num_classes)
        self.pair, self.image_size = pair, image_size

    def forward(self, images):
        out = self.classifier(self.conv(images).mean((2, 3)))
        return (out, out) if self.pair else out

def paired(num_classes, image_size, channels=3):
    return Wide(num_classes, image_size, channels, pair=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_encoders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_encoders", raising=False)
    return "users_encoders"


# The last linear layer, and the number of features before it.
@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("convnext_atto", "head.fc", 320),
        ("swin_tiny_patch4_window7_224", "head.fc", 768),
        ("regnetx_002", "head.fc", 368),
        ("mobilenetv3_small_050", "classifier", 1024),
        ("vit_tiny_patch16_224", "head", 192),
    ],
)
def test_models_of_timm_train_and_give_pooled_features(name: str, head: str, width: int) -> None:
    pytest.importorskip("timm")
    size = 224 if "swin" in name else 64
    torch.manual_seed(0)
    model = MoCo(build_encoder(f"timm/{name}", size, 2), dim=8, queue_size=16, mlp=True)
    assert head_name(model.encoder_q) == head
    images = torch.randn(2, 2, size, size)
    model(images, images).loss.backward()
    assert all(p.grad is not None for p in model.encoder_q.parameters() if p.requires_grad)
    with evaluating(model.encoder_q), torch.no_grad():
        found = features(model.encoder_q, images)
    assert found.shape == (2, width)
    assert not any(n.startswith(f"{head}.") for n in backbone_state_dict(model))
    replace_head(model.encoder_q, nn.Linear(width, 3))
    assert model.encoder_q(images).shape == (2, 3)


def test_functions_of_the_user_build_encoders(module: str) -> None:
    encoder = build_encoder(f"{module}:Wide", 16, 5)(num_classes=7)
    assert encoder.image_size == 16 and head_name(encoder) == "classifier"
    assert features(encoder, torch.randn(2, 5, 16, 16)).shape == (2, 6)
    for name, said in (
        (f"{module}:paired", "returns tuple"),
        (f"{module}:plain", r"returns \(2, 4\)"),
        (f"{module}:nothing", "has no function 'nothing'"),
        ("no_such_module:build", "there is no module 'no_such_module'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_encoder(name, 16)(num_classes=7)
    with pytest.raises(ConfigError, match="cannot take images of 2 x 2 pixels"):
        build_encoder(f"{module}:Wide", 2)(num_classes=7)
    with pytest.raises(ConfigError, match="channels"):
        build_encoder(f"{module}:plain", 16, 5)


def test_unknown_models_of_timm_are_refused_with_the_nearest_name() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"nearest one is timm/convnext_"):
        build_encoder("timm/convnext_attto")
    with pytest.raises(ConfigError, match="expected timm/NAME or timm/NAME:pretrained"):
        build_encoder("timm/resnet18:weights")


def test_a_trial_of_an_encoder_leaves_modes_and_random_numbers_as_they_are() -> None:
    pytest.importorskip("timm")
    import timm

    torch.manual_seed(0)
    encoder = build_encoder("timm/resnet18", 32)(num_classes=5)
    ours = torch.rand(3)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5, in_chans=3)
    assert torch.equal(ours, torch.rand(3))
    assert all(part.training for part in encoder.modules())
    for name, value in theirs.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)


def test_tokens_and_maps_are_pooled() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert torch.equal(pooled(maps, channels_last=False), maps.mean((2, 3)))
    assert torch.equal(pooled(maps, channels_last=True), maps.mean((1, 2)))
    assert torch.equal(pooled(maps[..., 0], channels_last=True), maps[..., 0].mean(1))
    with pytest.raises(ValueError, match="features"):
        pooled(torch.zeros(2), channels_last=False)
