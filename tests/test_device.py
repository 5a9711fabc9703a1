"""The precision of a run follows the CPU, the network, and the run that is continued."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mocofast import device
from mocofast.config import Config
from mocofast.device import choose_autocast, cpu_bf16, gains_from_bf16
from mocofast.models.encoders import build_encoder
from mocofast.train import run

CPU = torch.device("cpu")


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512: bool, onednn: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)


def encoder(arch: str, size: int = 32) -> nn.Module:
    with torch.device("meta"):  # the weights take no memory
        return build_encoder(arch, size)(num_classes=16)


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
    ("arch", "gains"),
    [
        *(("resnet18", True), ("resnet18_cifar", True), ("resnet50", True)),
        *(("resnet_tiny", False), ("vit_tiny_cifar", False), ("vit_small", False)),
    ],
)
def test_auto_takes_bf16_where_cpu_and_network_gain(
    arch: str, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = encoder(arch, 224 if arch == "vit_small" else 32)
    monkeypatch.setattr(device, "wrong_in_bf16", lambda encoder, size: "")
    assert gains_from_bf16(network) is gains
    for instructions in ("AMX", ""):
        monkeypatch.setattr(device, "cpu_bf16", lambda found=instructions: found)
        assert choose_autocast("auto", CPU, network)._enabled is (gains and bool(instructions))
        assert choose_autocast("bf16", CPU, network)._enabled
        assert not choose_autocast("fp32", CPU, network)._enabled
        assert not choose_autocast("auto", CPU)._enabled


def test_bf16_is_not_taken_where_gradients_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_bf16", lambda: "AMX")
    network = build_encoder("resnet18")(num_classes=8).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert device.wrong_in_bf16(network, 16) == "layer4.0.conv1"
    assert device.wrong_in_bf16(network, 32) == ""
    assert not choose_autocast("auto", CPU, network, 16)._enabled
    assert choose_autocast("auto", CPU, network, 32)._enabled
    assert all(part.training for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert device.wrong_in_bf16(nn.Linear(3, 3), 16) == ""


def test_a_continued_run_keeps_its_precision_on_a_cpu() -> None:
    config = Config()
    cuda = torch.device("cuda")
    old: dict[str, Any] = {}  # a checkpoint without its precision: every CPU took fp32
    for saved, where, expected in (
        (None, CPU, "auto"),
        (old, CPU, "fp32"),
        ({"precision": "fp32"}, CPU, "fp32"),
        ({"precision": "bf16"}, CPU, "auto"),
        (old, cuda, "auto"),
        ({"precision": "fp32"}, cuda, "auto"),
    ):
        assert run._precision(config, where, saved) == expected
    config.train.precision = "bf16"
    assert run._precision(config, CPU, old) == "bf16"
