"""Fair timing and peak memory: candidates interleaved in one process, warm-up apart, medians with their spread."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

COPIED = 256 * 2**20  # bytes of the copy that measures memory bandwidth
MINIMUM_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample, so that the clock's grain does not count

Call = Callable[[], Any]  # what is timed: one call of a candidate
Key = TypeVar("Key", bound=Hashable)


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def interleaved(
    candidates: dict[Key, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[Key, Timing]:
    """Time every candidate once per round, in random order, so that a slow spell of the machine hits all alike."""
    calls = {}
    for name, function in candidates.items():
        for _ in range(3):  # the first calls load code, fill caches and compile
            once = _sample(function, 1, device)
        calls[name] = max(1, round(MINIMUM_SAMPLE / once))
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    # In a fixed order, whoever follows a large copy pays for its cache lines: 8% on a CPU.
    shuffled = random.Random(0)
    for _ in range(repeats):
        for name in shuffled.sample(list(candidates), len(candidates)):
            samples[name].append(_sample(candidates[name], calls[name], device))
    return {name: _summary(values) for name, values in samples.items()}


def interleaved_with_copy(
    candidates: dict[str, Call], repeats: int, device: torch.device
) -> tuple[dict[str, Timing], float]:
    """Times the candidates and a large copy, as `interleaved` does.

    Returns:
        times: one Timing for each candidate, without the copy.
        bandwidth: bytes a second that the copy reads and writes.
    """
    block = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    times = interleaved({**candidates, "copy": lambda: target.copy_(block)}, repeats, device)
    return times, 2 * block.numel() / times.pop("copy").median


def _sample(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    if (
        calls > 1
    ):  # a short one's first call would mostly time the cache that its predecessor has filled
        function()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a new process: what others left in memory would hide its own peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_extra_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call takes at its peak beyond what was there before it; None where that cannot be measured.

    On CUDA the allocator's count. On a CPU the peak of the resident set (Linux): call it first with a small problem,
    as loading code also takes memory.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # else memory that earlier calls freed is reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def resident_memory(own: bool = True) -> int | None:
    """Bytes in memory of the processes that this one has started, and of itself if `own`, pages that several share
    divided among them; None where that cannot be known."""
    processes: list[int | str | None] = [child.pid for child in multiprocessing.active_children()]
    total = 0
    for process in [*processes, *(["self"] if own else [])]:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        except ProcessLookupError:  # ended meanwhile
            continue
        except OSError:
            return None
        # Without the pages of files: libraries, whose shares change with whatever else runs on the machine.
        total += sum(
            1024 * int(found) for found in re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+) kB", text)
        )
    return total


def megabytes(extra_bytes: dict[str, int | None]) -> dict[str, float]:
    """By name, where memory could be measured."""
    return {name: value / 1e6 for name, value in extra_bytes.items() if value is not None}


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None
    return 1024 * int(match.group(1))


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside the code: device, versions, date; and the commit."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """GPU model, or CPU model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1) if match else platform.machine()


def cache_size(device: torch.device) -> int:
    """Bytes of the last cache before memory; 32 MB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [level.read_text(encoding="utf-8").strip() for level in levels]
    return max((int(text[:-1]) * 1024 for text in texts if text.endswith("K")), default=32 * 2**20)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this runs from, with + where files differ from it; None outside one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()
