"""What lies between the ranks: interface, back end, latency and bandwidth."""

from __future__ import annotations

import os
import platform
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mocofast import distributed
from mocofast.config import ConfigError
from mocofast.device import choose_device

LARGE = 2**26  # bytes: about the gradients of a ResNet-50 in fp16, or half of them in fp32
ROUNDS = 9


def measure(device_name: str = "auto") -> list[str]:
    """Measures collectives between the ranks of torchrun. Returns lines of text, on rank 0 alone.

    Raises ConfigError for a single rank.
    """
    device = choose_device(device_name)
    rank, world_size, local_rank = distributed.init_from_environment(device)
    if world_size == 1:
        raise ConfigError(
            "--network: measures between ranks; start it as the run is started, such as "
            "torchrun --nproc-per-node 2 -m mocofast doctor --network"
        )
    try:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank)
        places = distributed.gather_objects(_place(device))
        small = torch.zeros(1, device=device)
        large = torch.zeros(LARGE // 4, device=device)
        received = torch.empty_like(large)
        latency = _seconds(lambda: dist.all_reduce(small), device)
        reduced = _seconds(lambda: dist.all_reduce(large), device)
        exchanged = _seconds(lambda: dist.all_to_all_single(received, large), device)
        if rank:
            return []
        moved = LARGE * (world_size - 1) / world_size  # bytes that a rank sends
        return [
            f"{world_size} ranks, back end {dist.get_backend()}",
            *(f"rank {number}: {place}" for number, place in enumerate(places)),
            f"latency of an all-reduce of one number: {latency * 1e6:.0f} us",
            # A ring sends every number twice: once as a partial sum, once as the sum.
            f"bandwidth of gradients (all-reduce): {2 * moved / reduced / 1e9:.2f} GB/s a rank",
            f"bandwidth of the shuffle (all-to-all): {moved / exchanged / 1e9:.2f} GB/s a rank",
            f"{LARGE / 2**20:.0f} MiB, medians of {ROUNDS} rounds",
        ]
    finally:
        distributed.shutdown()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median duration of a collective, after two rounds of warm-up."""
    durations = []
    for _ in range(2 + ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[2:])


def _place(device: torch.device) -> str:
    """Describes where a rank runs: host, address, interface, and device."""
    variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
    addresses = _addresses()
    named = os.environ.get(variable, "")
    if named:
        address, interface = addresses.get(named, "no IPv4 address"), named
    else:  # gloo takes the address of the host's name. NCCL chooses for itself
        try:
            address = socket.gethostbyname(platform.node())
        except OSError:
            address = "no address of the host's name"
        interface = next((name for name, own in addresses.items() if own == address), "")
    where = interface or f"of no interface; set {variable}"
    return f"{platform.node()}, {address} ({where}), {device}"


def _addresses() -> dict[str, str]:
    """Returns the IPv4 address of every interface that has one, {interface: address}."""
    import fcntl  # Linux and macOS

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR of netdevice(7): bytes 20 to 23 of the answer are the address.
                answer = fcntl.ioctl(probe.fileno(), 0x8915, name.encode().ljust(256, b"\0"))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
