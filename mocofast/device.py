"""Chooses device, threads and precision of a run, depending on the machine."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

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
    precision: str, device: torch.device, encoder: nn.Module | None = None, size: int = 0
) -> torch.autocast:
    """Returns the autocast of `train.precision`: bf16, fp32 (disabled) or auto.

    encoder: the network of the run.
    size: side of its images, in pixels.

    auto, GPUs: bf16 where the GPU supports it.
    auto, CPUs: bf16 where the CPU has instructions for it (`cpu_bf16`) and `encoder` gains
        (`gains_from_bf16`) and trains correctly (`wrong_in_bf16`). Without an encoder: fp32.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto" and encoder is not None and cpu_bf16():
        bf16 = gains_from_bf16(encoder) and not wrong_in_bf16(encoder, size)
    else:
        bf16 = False
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


def wrong_in_bf16(encoder: nn.Module, size: int) -> str:
    """Returns the name of a convolution whose gradient a CPU gets wrong in bf16, "" for none.

    encoder: on the CPU. Runs once on an empty image, in eval mode.
    size: side of the images, in pixels.

    oneDNN (torch 2.11, AVX512-BF16) leaves parts of the gradient of a weight uninitialised, which
    no tensor shows until the loss diverges, if the input is 1 pixel wide and the kernel is 3 wide
    with a stride, or wider. ResNet-18 at 16 pixels has such a convolution, and none at 32 pixels.
    """
    found: list[str] = []

    def check(name: str, convolution: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        kernel, stride = max(convolution.kernel_size), max(convolution.stride)
        if min(inputs[0].shape[2:]) == 1 and (kernel >= 5 or (kernel > 1 and stride > 1)):
            found.append(name)

    convolutions = {
        name: part for name, part in encoder.named_modules() if isinstance(part, nn.Conv2d)
    }
    if not convolutions:
        return ""
    handles = [
        part.register_forward_pre_hook(partial(check, name)) for name, part in convolutions.items()
    ]
    modes = [(part, part.training) for part in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            encoder(torch.zeros(1, next(iter(convolutions.values())).in_channels, size, size))
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes:
            part.training = training
    return found[0] if found else ""
