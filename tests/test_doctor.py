"""doctor.py reports what the machine has and what the code chooses, and never raises."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mocofast_kernels import cpu_convolution

from mocofast import device, doctor
from mocofast.doctor import Finding

PARTS = [
    *("mocofast", "Python", "torch", "GPU", "CPU", "memory", "device", "precision", "engine"),
    *("Triton", "fused ops", "ops on CPUs", "DALI", "data loader", "view operators", "crops"),
    *("nvImageCodec", "torch.distributed"),
]


def found() -> dict[str, Finding]:
    return {finding.part: finding for finding in doctor.report()}


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Hides packages, as if they were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_every_part_is_reported_with_this_machines_versions() -> None:
    findings = found()
    assert list(findings) == PARTS
    assert findings["Python"].use == platform.python_version()
    assert findings["torch"].use == torch.__version__
    assert "unknown" not in [finding.use for finding in findings.values()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_without_a_gpu_every_part_falls_back_and_says_why() -> None:
    findings = found()
    assert findings["GPU"].use == "none"
    assert findings["device"].use == "cpu"
    assert findings["fused ops"].use == "blocked PyTorch"
    assert "gloo" in findings["torch.distributed"].why


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_the_precision_of_a_cpu_follows_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_bf16", lambda: "AMX")
    assert found()["precision"].use == "bf16"
    assert "for ResNets and ViTs, because this CPU has AMX; fp32" in found()["precision"].why
    monkeypatch.setattr(device, "cpu_bf16", lambda: "")
    assert found()["precision"].use == "fp32"
    assert "no instructions for bf16" in found()["precision"].why


def test_a_machine_with_two_gpus_is_described_with_the_command_that_uses_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(
        name="H100", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpus = [finding for finding in doctor.report() if finding.part == "GPU"]
    assert [gpu.use for gpu in gpus] == ["H100", "H100"]
    assert gpus[1].why == "cuda:1, 80 GiB, compute capability 9.0, 132 SMs"
    findings = found()
    assert findings["precision"].use == "bf16"
    assert "torchrun --nproc-per-node 2 -m mocofast pretrain" in findings["device"].why
    assert "nccl" in findings["torch.distributed"].why


@pytest.mark.gpu
def test_with_a_gpu_the_kernels_and_the_gpu_are_named() -> None:
    findings = found()
    assert findings["GPU"].use == torch.cuda.get_device_name(0)
    assert findings["device"].use == "cuda:0"
    assert findings["fused ops"].use == "Triton kernels"
    assert "nccl" in findings["torch.distributed"].why


def test_what_is_missing_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    hide(monkeypatch, "triton", "nvidia.dali", "nvidia.nvimgcodec")
    findings = found()
    assert "pip install triton" in findings["Triton"].why
    assert "pip install 'mocofast[cuda1" in findings["DALI"].why
    assert findings["data loader"] == ("data loader", "torchvision", "DALI cannot be imported")
    assert findings["nvImageCodec"].use == "not installed"


def test_convolutions_on_cpus_are_compiled_or_have_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(library: object, amx: bool = False) -> list[tuple[str, str]]:
        monkeypatch.setattr(cpu_convolution, "library", lambda: library)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        cpu_convolution.kind_of.cache_clear()
        found = [finding for finding in doctor.report() if finding.part == "ops on CPUs"]
        return [(use, why) for _, use, why in found if why.startswith("convolutions on a CPU")]

    def of_cpu(*known: int) -> tuple[object, str]:
        return SimpleNamespace(convolution_runs=lambda kind: kind in known), ""

    every = "convolutions on a CPU, fp32", "convolutions on a CPU, bf16"
    try:
        assert rows(of_cpu(0, 1)) == [
            ("compiled", f"{every[0]}, AVX-512"),
            ("compiled", f"{every[1]}, AVX512-BF16"),
        ]
        fast = rows(of_cpu(0, 1), amx=True)
        assert fast[0] == ("compiled", f"{every[0]}, AVX-512")
        assert fast[1][0] == "PyTorch" and "AMX" in fast[1][1]
        assert rows(of_cpu(2))[0] == ("compiled", f"{every[0]}, AVX2")
        unknown = "this CPU or the C compiler does not know"
        assert rows(of_cpu()) == [
            ("PyTorch", f"{every[0]}; {unknown} AVX-512 or AVX2"),
            ("PyTorch", f"{every[1]}; {unknown} AVX512-BF16"),
        ]
        missing = rows((None, "not compiled: install a C compiler"))
        assert missing == [("PyTorch", f"{e}; not compiled: install a C compiler") for e in every]
        assert all("older build" in why for _, why in rows((SimpleNamespace(), "")))
    finally:
        cpu_convolution.kind_of.cache_clear()


def test_a_probe_that_fails_is_a_finding_and_the_others_still_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"libcuda.so.1 for {name}")

    monkeypatch.setattr(importlib, "import_module", broken)
    findings = found()
    assert list(findings) == PARTS
    assert findings["torch"].use == torch.__version__
    if importlib.util.find_spec("triton"):
        assert findings["Triton"] == (
            "Triton",
            "unknown",
            "the check failed: OSError: libcuda.so.1 for triton",
        )


def test_the_table_is_aligned_and_wrapped_to_the_width() -> None:
    rows = [
        Finding("a", "first", "one two three four five six seven eight"),
        Finding("longer", "x", ""),
    ]
    assert doctor.table(rows, 47).split("\n") == [
        "a       first  one two three four five six",
        "               seven eight",
        "longer  x",
    ]


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert [part for part in PARTS if any(line.startswith(part) for line in lines)] == PARTS
