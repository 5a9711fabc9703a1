"""Runs a function in several gloo processes on this machine and returns the results."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mocofast import distributed


def free_port() -> int:
    """Returns a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """Runs `function(rank)` in `world_size` processes of a new process group.

    function: must pickle. The result must pickle too. Runs on one thread, with torchrun's
        environment variables. A DistributedDataParallel wrapper must be a local variable of
        the function: the wrapper must end before the group (`distributed.shutdown`).
    world_size: number of processes.

    Returns the results in the order of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _work,
            (function, world_size, free_port(), folder),
            nprocs=world_size,
            start_method="forkserver",  # the tests import PyTorch once for all processes
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _work(
    rank: int, function: Callable[[int], Any], world_size: int, port: int, folder: str
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_from_environment("cpu")
    # A single process needs a group too, for DistributedDataParallel.
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    distributed.shutdown()
