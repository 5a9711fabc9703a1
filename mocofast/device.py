"""The device, threads and precision of a run, chosen by what the machine has."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """`train.device`: auto takes a GPU where there is one, and under torchrun this process's own."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_threads(cores: int) -> int:
    """Threads of a CPU's computation, of the `cores` this process may use: half; the other half decodes and augments.

    Threads that share cores wait for each other in every parallel region: on two busy cores the demo took 7.5 minutes
    with two threads, and 1 minute with one.
    """
    return max(1, cores // 2)


def choose_autocast(precision: str, device: torch.device) -> torch.autocast:
    """`train.precision`: auto is bf16 on GPUs that have it, else fp32 (bf16 products are very slow on most CPUs)."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = precision == "bf16" or (precision == "auto" and bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
