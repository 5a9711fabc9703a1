"""Chooses device, threads and precision of a run, depending on the machine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from mocofast_kernels.cpu_products import cpu_bf16
from torch import Tensor, nn

from mocofast.errors import ConfigError
from mocofast.view_sizes import Size, height_width

if TYPE_CHECKING:
    from mocofast.config import Config

__all__ = [
    "choose_autocast",
    "choose_device",
    "choose_threads",
    "cpu_bf16",
    "faster_in_bf16",
    "knn_autocast",
    "loss_scaler",
    "memory_bytes",
    "precision_note",
    "run_autocast",
    "same_bits",
    "short_name",
    "where_float64_is",
    "wide",
    "wrong_in_bf16",
    "wrong_views",
]


# Encoders whose steps were measured to be faster in bf16 on a CPU with instructions for bf16.
FASTER_IN_BF16 = ("resnet1", "resnet3", "resnet5", "wide_resnet", "vit_")


def choose_device(name: str) -> torch.device:
    """Returns the device of `train.device`.

    name: auto, cpu, cuda, cuda:N, gpu (as cuda) or mps. auto: the current GPU, or the CPU without
        a GPU. (Under torchrun, every process has made a different GPU the current GPU.)
    Raises ConfigError for another name, and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|gpu|mps|cuda(:\d+)?", name) is None:
        raise ConfigError(
            f"train.device: expected auto, cpu, cuda, cuda:N, gpu or mps, got {name!r}"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("train.device: mps needs Apple's Metal, which is not here; cpu works")
    if name == "mps" or name == "cpu":
        return torch.device(name)
    device, count = torch.device(name.replace("gpu", "cuda")), torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        raise ConfigError(
            f"train.device: {name} needs a GPU that PyTorch sees, and it sees {count}; "
            "--train.device cpu works, and mocofast doctor shows what is here"
        )
    return device


def where_float64_is(x: Tensor) -> Tensor:
    """Returns x, or a copy on the CPU where the device of x has no float64 (MPS)."""
    return x.cpu() if x.device.type == "mps" else x


def wide(x: Tensor) -> Tensor:
    """Returns x in float64: on its device, or on the CPU where the device has no float64 (MPS)."""
    return where_float64_is(x).double()


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
    """Returns the autocast of `train.precision`: bf16, fp16, fp32 (disabled) or auto.

    auto: bf16 on a GPU that supports it, fp16 on another GPU, else fp32. (On a CPU `auto` depends
    on the encoder, see `run_autocast`.)
    """
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def run_autocast(config: Config, encoder: nn.Module, device: torch.device) -> torch.autocast:
    """Returns the autocast of `train.precision`, for a run and for evaluations of its encoder.

    encoder: of the run, on `device`.
    auto on a CPU: bf16 if `faster_in_bf16` names instructions and `wrong_in_bf16` no convolution,
        else fp32. On a GPU as `choose_autocast`.
    """
    precision = config.train.precision
    if precision == "auto" and device.type == "cpu" and faster_in_bf16(config):
        precision = "fp32" if wrong_views(config, encoder) else "bf16"
    return choose_autocast(precision, device)


def faster_in_bf16(config: Config) -> str:
    """Returns this CPU's instructions for bf16 if they make steps of `model.arch` faster, else "".

    True for encoders that were measured to be faster (docs/precision.md).
    """
    return cpu_bf16() if config.model.arch.startswith(FASTER_IN_BF16) else ""


def knn_autocast(config: Config, encoder: nn.Module, device: torch.device) -> torch.autocast:
    """Returns the autocast of `knn.precision`. encoder: on `device`."""
    if config.knn.precision == "train":
        return run_autocast(config, encoder, device)
    return choose_autocast(config.knn.precision, device)


def loss_scaler(autocast: torch.autocast, mode: str) -> torch.amp.GradScaler | None:
    """Returns the scaler of the loss that fp16 needs (Micikevicius et al. 2018, arXiv:1710.03740).

    mode: of the engine. Raises ConfigError for "graph". None for other precisions.
    """
    if not autocast._enabled or autocast.fast_dtype != torch.float16:
        return None
    if mode == "graph":
        raise ConfigError(
            "engine.mode: graph cannot skip a step, as fp16 must after an overflow; "
            "--engine.mode compile works, and so does --train.precision bf16"
        )
    return torch.amp.GradScaler(autocast.device)


def short_name(autocast: torch.autocast) -> str:
    """Returns fp32, bf16 or fp16."""
    if not autocast._enabled:
        return "fp32"
    return "fp16" if autocast.fast_dtype == torch.float16 else "bf16"


def wrong_in_bf16(encoder: nn.Module, size: Size) -> str:
    """Returns the name of a convolution that a CPU gets wrong in bf16, "" for none.

    encoder: on the CPU. Runs once on an empty image, in eval mode.
    size: of the images.

    What oneDNN gets wrong (torch 2.11, AVX512-BF16) no tensor shows:
    - Parts of the gradient of a weight stay uninitialised until the loss diverges, if the input is
      1 pixel wide and the kernel is 3 wide with a stride, or wider. ResNet-18 at 16 pixels has such
      a convolution, and none at 32 pixels.
    - The result has nothing to do with the input, if a patch is as wide as a channels-last input of
      few channels, of an even number: 4 or 16 channels of 16 x 16 patches, 16 of 4 x 4 patches.
    """
    found: list[str] = []

    def check(name: str, convolution: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        kernel, stride = max(convolution.kernel_size), max(convolution.stride)
        channels, *sides = inputs[0].shape[1:]
        thin = min(sides) == 1 and (kernel >= 5 or (kernel > 1 and stride > 1))
        few = channels % 2 == 0 and channels < 32
        if thin or (few and kernel == stride >= 4 and min(sides) < 2 * kernel):
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
            channels = next(iter(convolutions.values())).in_channels
            encoder(torch.zeros(1, channels, *height_width(size)))
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes:
            part.training = training
    return found[0] if found else ""


def wrong_views(config: Config, encoder: nn.Module) -> tuple[str, Size] | None:
    """Returns what `wrong_in_bf16` names, and the size, of the first size of a run's views.

    None: the CPU gets every convolution right at every size.
    """
    for size in {config.augment.size, *config.augment.training_sizes()}:
        if wrong := wrong_in_bf16(encoder, size):
            return wrong, size
    return None


def precision_note(autocast: torch.autocast, config: Config) -> str:
    """Returns the precision of a run, for the log, with the reason on a CPU.

    config: of the run.
    """
    name = f"{short_name(autocast)} autocast" if autocast._enabled else "fp32"
    instructions = cpu_bf16()
    if config.train.precision != "auto" or autocast.device != "cpu" or not instructions:
        return name
    if autocast._enabled:
        return f"{name}: this CPU has {instructions}"
    if faster_in_bf16(config):
        return f"{name}: in bf16 this CPU would get a convolution wrong at this size of views"
    if config.model.arch == "resnet_tiny":  # gains nothing
        return name
    return f"fp32 (this CPU has {instructions}: --train.precision bf16 may be faster)"


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
