"""What a process really sends and receives: the kernel's counters of its TCP sockets, collective by collective."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Of Linux's struct tcp_info (linux/tcp.h): tcpi_bytes_acked and tcpi_bytes_received, 64 bits each.
BYTES_ACKED = 120


class Traffic(NamedTuple):
    """Bytes over all TCP connections of this process since they were made."""

    sent: int
    received: int


class Collective(NamedTuple):
    """One collective of this rank."""

    name: str  # of the c10d operator: allgather_, alltoall_base_, ...
    dtype: torch.dtype
    sent: int
    received: int


def traffic() -> Traffic:
    """Reads the sockets' counters."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile, or of a family that Python does not know
        with duplicate:
            try:
                info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:
                continue  # no TCP socket
        if len(info) >= BYTES_ACKED + 16:
            acked, got = struct.unpack_from("QQ", info, BYTES_ACKED)
            sent, received = sent + acked, received + got
    return Traffic(sent, received)


class Wire(TorchDispatchMode):
    """Runs every collective on its own, between barriers, and records its bytes; DDP's are seen as well.

    The barriers' own bytes, about a kilobyte, are measured first and subtracted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._overhead = min(self._between_barriers(lambda: None)[1] for _ in range(3))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "c10d":
            return function(*args, **(kwargs or {}))
        tensors = [t for arg in args for t in torch.utils._pytree.tree_leaves(arg) if isinstance(t, torch.Tensor)]

        def call() -> Any:
            result = function(*args, **(kwargs or {}))
            for work in torch.utils._pytree.tree_leaves(result):
                if hasattr(work, "wait"):
                    work.wait()
            return result

        result, moved = self._between_barriers(call)
        name = function.overloadpacket.__name__
        overhead = self._overhead
        self.collectives.append(
            Collective(name, tensors[0].dtype, moved.sent - overhead.sent, moved.received - overhead.received)
        )
        return result

    def _between_barriers(self, call: Any) -> tuple[Any, Traffic]:
        dist.barrier()
        before = traffic()
        result = call()
        dist.barrier()
        after = traffic()
        return result, Traffic(after.sent - before.sent, after.received - before.received)
