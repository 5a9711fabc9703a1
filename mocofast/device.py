"""Chooses device, threads and precision of a run, depending on the machine."""

from __future__ import annotations

import torch


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


def choose_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns the autocast of `train.precision`: bf16, fp32 (disabled) or auto.

    auto: bf16 on GPUs that support bf16, or else fp32 (most CPUs are very slow in bf16).
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = precision == "bf16" or (precision == "auto" and bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
