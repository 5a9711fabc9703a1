"""Chooses device, threads and precision of a run, depending on the machine."""

from __future__ import annotations

import torch
from torch import nn

# ResNet-18 has 11 million weights in convolutions, resnet_tiny 72,000, vit_base 590,000.
CONVOLUTION_WEIGHTS = 1_000_000


def choose_device(name: str) -> torch.device:
    """Returns the device of `train.device`.

    name: auto, or a name that torch.device accepts. auto: the current GPU, or the CPU without a
        GPU. (Under torchrun, every process has made a different GPU the current GPU.)
    """
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_threads(cores: int) -> int:
    """Returns the number of threads for computation on a CPU: half of `cores`, at least 1.

    The other half decodes and augments images. Threads that share a core wait for each other in
    every parallel region: on two busy cores the demo took 7.5 minutes with two threads, and
    1 minute with one thread.

    cores: cores that this process may use.
    """
    return max(1, cores // 2)


def choose_autocast(
    precision: str, device: torch.device, encoder: nn.Module | None = None
) -> torch.autocast:
    """Returns the autocast of `train.precision`: bf16, fp32 (disabled) or auto.

    auto, GPUs: bf16 where the GPU supports it.
    auto, CPUs: bf16 where the CPU has instructions for it (`cpu_bf16`) and `encoder` gains
        (`gains_from_bf16`). Without an encoder: fp32.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = encoder is not None and gains_from_bf16(encoder) and bool(cpu_bf16())
    enabled = precision == "bf16" or (precision == "auto" and bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def cpu_bf16() -> str:
    """Returns the name of the CPU's instructions for products of bf16, "" if there are none.

    A CPU without such instructions computes in bf16 many times slower than in fp32.
    """
    if not torch.backends.mkldnn.is_available():  # the library that uses the instructions
        return ""
    queries = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    for name, query in queries.items():
        if getattr(torch.cpu, query, lambda: False)():
            return name
    return ""


def gains_from_bf16(encoder: nn.Module) -> bool:
    """Returns whether a CPU's step is clearly faster in bf16: many weights in convolutions.

    On a CPU with AVX512-BF16 a step of ResNet-18 is 1.8 times faster, and a step of resnet_tiny
    1.1 times. A ViT at 224 pixels was .7 times as fast on a CPU with AMX.
    """
    convolutions = (part for part in encoder.modules() if isinstance(part, nn.Conv2d))
    return sum(part.weight.numel() for part in convolutions) >= CONVOLUTION_WEIGHTS
