"""Real gloo processes on this machine: each runs one function and hands back what it returned."""

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
    """A TCP port on which nothing listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """`function(rank)` of every rank in a process group of its own, in order of ranks.

    function: pickles, as what it returns does; runs on one thread, with torchrun's environment. A wrapper that it
    makes of a model (DistributedDataParallel) ends with it, before the group does: see `distributed.shutdown`.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _work, (function, world_size, free_port(), folder), nprocs=world_size
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
    if (
        not dist.is_initialized()
    ):  # one process alone: DistributedDataParallel asks for a group even there
        dist.init_process_group("gloo")
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    distributed.shutdown()
