"""Real gloo processes for tests: each runs one function and hands back what it returned."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mocofast import distributed


def on_ranks(function: Callable[[int], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """`function(rank)` of every rank, in order of ranks. function: of a module; folder: for the results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_work, (function, world_size, port, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _work(rank: int, function: Callable[[int], Any], world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_from_environment("cpu")
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    distributed.shutdown()
