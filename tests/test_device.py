"""The precision of a run, and the networks that a CPU trains wrongly in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mocofast import device
from mocofast.config import ConfigError
from mocofast.device import (
    choose_autocast,
    cpu_bf16,
    knn_autocast,
    precision_note,
    run_autocast,
    short_name,
)
from mocofast.models.encoders import build_encoder
from mocofast.settings import apply, load_recipe
from mocofast.train.build import check_gradients

CPU = torch.device("cpu")


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512: bool, onednn: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)


def test_bf16_instructions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, amx=True, avx512=True, onednn=True)
    assert cpu_bf16() == "AMX"
    fake_cpu(monkeypatch, amx=False, avx512=True, onednn=True)
    assert cpu_bf16() == "AVX512-BF16"
    fake_cpu(monkeypatch, amx=False, avx512=False, onednn=True)
    assert cpu_bf16() == ""
    fake_cpu(monkeypatch, amx=True, avx512=True, onednn=False)
    assert cpu_bf16() == ""
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # an older torch
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_bf16() == ""


@pytest.mark.parametrize(
    ("arch", "sizes", "avx512", "precision"),
    [
        ("resnet18_cifar", (32,), True, "bf16"),
        ("vit_tiny_cifar", (32,), True, "bf16"),
        ("resnet18_cifar", (32,), False, "fp32"),  # no instructions
        ("resnet18", (16,), True, "fp32"),  # wrong gradients
        ("resnet18", (32, 16), True, "fp32"),  # wrong gradients in some epochs
        ("resnet_tiny", (32,), True, "fp32"),  # gains nothing
        ("mocofast.models.narrow:resnet18_quarter", (32,), True, "fp32"),  # not known
    ],
)
def test_auto_on_a_cpu_looks_at_its_instructions_and_the_encoder(
    arch: str, sizes: tuple[int, ...], avx512: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cpu(monkeypatch, amx=False, avx512=avx512, onednn=True)
    config = load_recipe("digits")
    apply(config, {"model.arch": arch, "augment.size": sizes[0]})
    if len(sizes) > 1:
        apply(config, {"augment.sizes": (f"0:{sizes[1]}", f"2:{sizes[0]}")})
    encoder = build_encoder(arch, sizes[0])(num_classes=8)
    assert short_name(run_autocast(config, encoder, CPU)) == precision
    assert short_name(knn_autocast(config, encoder, CPU)) == precision
    config.knn.precision = "fp32"
    assert short_name(knn_autocast(config, encoder, CPU)) == "fp32"
    for asked in ("fp32", "bf16"):
        config.train.precision = asked
        assert short_name(run_autocast(config, encoder, CPU)) == asked
    assert not choose_autocast("auto", CPU)._enabled


def test_bf16_is_refused_where_gradients_would_be_wrong() -> None:
    network = build_encoder("resnet18")(num_classes=8).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert device.wrong_in_bf16(network, 16) == "layer4.0.conv1"
    assert device.wrong_in_bf16(network, 32) == ""
    config = load_recipe("digits")
    config.augment.size = 32
    check_gradients(choose_autocast("bf16", CPU), network, config)
    config.augment.size = 16
    check_gradients(choose_autocast("auto", CPU), network, config)
    with pytest.raises(ConfigError, match=r"layer4\.0\.conv1 in bf16 at augment\.size 16"):
        check_gradients(choose_autocast("bf16", CPU), network, config)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert device.wrong_in_bf16(nn.Linear(3, 3), 16) == ""


@pytest.mark.parametrize(
    ("channels", "patch", "width", "wrong"),
    [(4, 16, 16, True), (16, 4, 4, True), (4, 16, 32, False), (3, 16, 16, False)],
)
def test_bf16_is_refused_where_images_of_few_channels_are_a_patch_wide(
    channels: int, patch: int, width: int, wrong: bool
) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(channels, 48, patch, patch))
    size = (2 * patch, width)
    assert device.wrong_in_bf16(encoder, size) == ("0" if wrong else "")
    if not wrong and cpu_bf16():  # what is let through is right on this CPU
        images = torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = encoder.double()(images.double())
            with torch.autocast("cpu", torch.bfloat16):
                result = encoder.float()(images)
        assert (result - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("arch", "size", "precision", "amx", "note"),
    [
        ("resnet18", 32, "auto", True, "bf16 autocast: this CPU has AMX"),
        ("resnet18", 32, "auto", False, "fp32"),
        ("resnet18", 32, "fp32", True, "fp32"),
        ("resnet18", 32, "bf16", True, "bf16 autocast"),
        (
            *("resnet18", 16, "auto", True),
            "fp32: in bf16 this CPU would get a convolution wrong at this size of views",
        ),
        ("resnet_tiny", 16, "auto", True, "fp32"),  # bf16 gains nothing
        (
            *("mocofast.models.narrow:resnet18_quarter", 32, "auto", True),
            "fp32 (this CPU has AMX: --train.precision bf16 may be faster)",
        ),
    ],
)
def test_the_log_of_a_run_names_the_precision_and_its_reason(
    arch: str, size: int, precision: str, amx: bool, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cpu(monkeypatch, amx=amx, avx512=False, onednn=True)
    encoder = build_encoder(arch, size)(num_classes=8)
    config = load_recipe("digits")
    apply(config, {"model.arch": arch, "augment.size": size, "train.precision": precision})
    assert precision_note(run_autocast(config, encoder, CPU), config) == note
