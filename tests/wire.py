"""Counts the bytes sent and received by a process in every collective.

Reads Linux's counters of the process's TCP sockets.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Offset in Linux's struct tcp_info (linux/tcp.h) of tcpi_bytes_acked and tcpi_bytes_received, 64
# bits each.
BYTES_ACKED = 120


class Traffic(NamedTuple):
    """Bytes over all TCP connections of this process, since the start of the connections."""

    sent: int
    received: int


class Collective(NamedTuple):
    """A collective of this rank."""

    name: str  # of the c10d operator: allgather_, alltoall_base_, ...
    dtype: torch.dtype
    sent: int
    received: int


def connections() -> list[socket.socket]:
    """Returns a duplicate of every TCP socket of this process."""
    found: dict[int, socket.socket] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                duplicate = socket.socket(fileno=os.dup(int(name)))
                if duplicate.type == socket.SOCK_STREAM and duplicate.family in (
                    socket.AF_INET,
                    socket.AF_INET6,
                ):
                    found.setdefault(os.fstat(duplicate.fileno()).st_ino, duplicate)
        except OSError:
            continue  # closed meanwhile, or a family that Python does not know
    return list(found.values())


def traffic(sockets: list[socket.socket]) -> Traffic:
    """Returns the sum of the sockets' counters."""
    infos = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) for s in sockets]
    counts = [struct.unpack_from("QQ", info, BYTES_ACKED) for info in infos]
    return Traffic(*map(sum, zip(*counts)))


class Wire(TorchDispatchMode):
    """Runs every collective between two barriers and records the bytes. Sees DDP's collectives too.

    The least traffic of barriers, measured at the start, is subtracted. If a counter is read
    early or late, a few messages of barriers remain, some 50 bytes each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        # Found once: on a busy machine a later search missed some sockets.
        self._sockets = connections()
        nothing = [self._between_barriers(lambda: None)[1] for _ in range(8)]
        self._overhead = Traffic(*map(min, zip(*nothing)))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for s in self._sockets:
            s.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace != "c10d":
            return function(*args, **(kwargs or {}))
        tensors = [
            t
            for arg in args
            for t in torch.utils._pytree.tree_leaves(arg)
            if isinstance(t, torch.Tensor)
        ]

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
            Collective(
                name,
                tensors[0].dtype,
                moved.sent - overhead.sent,
                moved.received - overhead.received,
            )
        )
        return result

    def _between_barriers(self, call: Any) -> tuple[Any, Traffic]:
        # Read before the barrier: a rank that leaves the barrier late may already receive bytes
        # of `call`.
        before = traffic(self._sockets)
        dist.barrier()
        result = call()
        dist.barrier()
        after = traffic(self._sockets)
        return result, Traffic(after.sent - before.sent, after.received - before.received)
