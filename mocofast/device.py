"""Chooses device, threads and precision of a run, depending on the machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from mocofast_kernels.cpu_products import cpu_bf16
from torch import Tensor, nn

from mocofast.plugins import is_plugin

if TYPE_CHECKING:
    from mocofast.config import Config

__all__ = [
    "choose_autocast",
    "choose_device",
    "choose_threads",
    "cpu_bf16",
    "memory_bytes",
    "precision_note",
    "same_bits",
    "wrong_in_bf16",
]


def choose_device(name: str) -> torch.device:
    """Returns the device of `train.device`.

    name: auto, or a name that torch.device accepts. auto: the current GPU, or the CPU without a
        GPU. (Under torchrun, every process has made a different GPU the current GPU.)
    """
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_threads(cores: int, sleeping: bool, large: bool) -> int:
    """Returns the number of threads for computation on a CPU.

    cores: cores that this process may use.
    sleeping: OpenMP's threads sleep while they wait. Otherwise half of the cores compute, and the
        other half decodes and augments images: threads that share a core would burn the core.
    large: the network has work for more than one thread. Asked for if threads sleep.
    """
    if not sleeping:
        return max(1, cores // 2)
    return cores if large else 1


def choose_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns the autocast of `train.precision`: bf16, fp32 (disabled) or auto.

    auto: bf16 on a GPU that supports it, else fp32. On a CPU bf16 must be asked for.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = precision == "bf16" or (precision == "auto" and bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


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


def precision_note(autocast: torch.autocast, config: Config, encoder: nn.Module) -> str:
    """Returns the precision of a run, for the log, with a hint where bf16 would be faster.

    config: of the run.
    encoder: of the run, on its device.

    The hint is for encoders of the library whose steps were measured to be faster in bf16 on a CPU
    with instructions for bf16, and whose gradients are right.
    """
    if autocast._enabled:
        return "bf16 autocast"
    arch = config.model.arch
    measured = arch != "resnet_tiny" and not is_plugin(arch)
    if config.train.precision != "auto" or autocast.device != "cpu" or not measured:
        return "fp32"
    instructions = cpu_bf16()
    if not instructions or wrong_in_bf16(encoder, config.augment.size):
        return "fp32"
    return f"fp32 (--train.precision bf16 is faster: this CPU has {instructions})"


def memory_bytes() -> int | None:
    """Returns the memory of this machine, or None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


@contextlib.contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Inside the block PyTorch takes only operations that give the same bits in every run.

    wanted: False changes nothing. An operation without such a form raises RuntimeError.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
