"""Fair timing and peak memory of several candidates in one process.

Candidates are interleaved and warmed up first. Results are medians and quartiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from mocofast_kernels.cpu_products import cpu_bf16

from mocofast.train.profile import memory_passes
from mocofast.usage import Usage, usage

PASSED = 512 * 2**20  # bytes of the passes that measure the bandwidth of memory
# Seconds. Shorter calls are repeated within a sample: the clock is not exact enough.
MINIMUM_SAMPLE = 2e-3
OTHER = 80_000_000  # bytes of other memory, between calls that find cold caches

BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""

# Multiplies matrices on all cores, as another training on the machine.
PYTORCH = """
import os, sys, torch
matrix = torch.rand(1500, 1500)
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    matrix @ matrix
"""

# Wakes every millisecond, and works for a tenth of it, as an editor or a browser.
LIGHT = """
import os, sys, time
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.0009)
    end = time.perf_counter() + 0.0001
    while time.perf_counter() < end:
        pass
"""

Call = Callable[[], Any]  # what is timed: one call of a candidate
Key = TypeVar("Key", bound=Hashable)
# Usage of the machine while other processes measured memory: no neighbours disturb it.
UNTIMED: list[Usage] = []
SO_FAR: dict[str, Any] = {}  # entries of a row that a measurement leaves when it is stopped


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def entries(times: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """Returns the entries of a row: medians and quartiles in milliseconds, by name."""
    return {
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "quartiles": {
            name: [round(1e3 * t, 4) for t in (time.low, time.high)] for name, time in times.items()
        },
    }


def interleaved(
    candidates: dict[Key, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    cold: bool = False,
) -> dict[Key, Timing]:
    """Times every candidate once per round, in random order.

    A slow moment of the machine then hits all candidates alike.

    candidates: {name: function without arguments}.
    repeats: number of rounds.
    device: where the functions run. A GPU is timed with CUDA events.
    cold: a sample is one call, after an untimed pass over OTHER bytes of other memory, as the rest
        of a training step leaves the caches. Otherwise a function also finds its own data there.

    Returns {name: Timing}, seconds per call. An exception leaves the times so far in SO_FAR.
    """
    once: dict[Key, float] = {}
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    try:
        # Warm-up: the first calls load code, fill caches and compile.
        for name, function in candidates.items():
            for _ in range(3):
                once[name] = _sample(function, 1, device)
        calls = {name: max(1, round(MINIMUM_SAMPLE / time)) for name, time in once.items()}
        other = torch.zeros(OTHER // 4 if cold else 0, device=device)
        # Timed rounds. In a fixed order, the candidate after a large copy was 8% slower on a CPU.
        shuffled = random.Random(0)
        for _ in range(repeats):
            for name in shuffled.sample(list(candidates), len(candidates)):
                if cold:
                    pass_over(other)
                samples[name].append(_sample(candidates[name], 1 if cold else calls[name], device))
    except BaseException:
        found = {str(name): summary(samples[name] or [time]) for name, time in once.items()}
        SO_FAR.update(entries(found))
        raise
    return {name: summary(values) for name, values in samples.items()}


def cpu_medians(candidates: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Returns {name: median CPU seconds of a call, all threads}, of calls in random order."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    shuffled = random.Random(0)
    for _ in range(1 + repeats):  # the first round loads code and takes memory
        for name in shuffled.sample(list(candidates), len(candidates)):
            before = time.process_time()
            candidates[name]()
            samples[name].append(time.process_time() - before)
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def interleaved_with_memory(
    candidates: dict[str, Call], repeats: int, device: torch.device
) -> tuple[dict[str, Timing], float]:
    """Times the candidates and large passes over memory, as `interleaved` does.

    Returns:
        times: a Timing for every candidate, without the passes.
        bandwidth: bytes a second, read and written, of the faster pass.
    """
    passes = memory_passes(PASSED, device)
    calls = {name: function for name, (function, _) in passes.items()}
    times = interleaved({**candidates, **calls}, repeats, device)
    return times, max(moved / times.pop(name).median for name, (_, moved) in passes.items())


def pass_over(memory: torch.Tensor) -> None:
    """Reads and writes memory, which takes the place of other data in the caches."""
    memory.add_(1.0)


def _sample(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    # Short calls: the first one would mostly time a cache full of the previous candidate's data.
    if calls > 1:
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


def summary(values: list[float]) -> Timing:
    """Returns median and quartiles."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


@contextlib.contextmanager
def busy_neighbours(count: int, program: str = BUSY) -> Iterator[None]:
    """Runs `count` processes of the program until the block ends.

    program: BUSY keeps a core busy, PYTORCH all cores, LIGHT a tenth of a core.

    The processes also end when this process ends, however it ends.
    """
    alone = [] if program == PYTORCH else ["-S"]  # without site-packages Python starts at once
    command = [sys.executable, *alone, "-c", program, str(os.getpid())]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            neighbour = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(neighbour.kill)
            assert neighbour.stdout is not None
            neighbour.stdout.readline()  # written when the imports are done
        yield


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a module-level function in a new process and returns the result.

    A new process has no memory left over from earlier calls, which would hide the peak. Without a
    GPU the process is a fork of a process that has imported PyTorch, which saves seconds.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(
        "forkserver" if forks and not torch.cuda.is_available() else "spawn"
    )
    before = usage()
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        after = usage()
        if before is not None and after is not None:
            UNTIMED.append(after.since(before))


def peak_extra_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Returns the peak memory of a call in bytes, minus the memory in use before the call.

    function: what to measure. On a CPU, call the function with a small problem first:
        loading code also takes memory.
    device: on CUDA the allocator counts. On a CPU the resident set counts (Linux).

    Returns None where memory cannot be measured.
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
        # Without malloc_trim, the call would reuse memory that earlier calls freed, uncounted.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def resident_memory(own: bool = True) -> int | None:
    """Returns the bytes in memory of this process's children.

    own: add the bytes of this process.

    A page that n processes share counts 1/n in every process. Pages of files (libraries) are
    left out: their shares change with everything else that runs on the machine.
    Returns None where /proc does not tell.
    """
    processes: list[int | str | None] = [child.pid for child in multiprocessing.active_children()]
    total = 0
    for process in [*processes, *(["self"] if own else [])]:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        except ProcessLookupError:  # the process has ended meanwhile
            continue
        except OSError:
            return None
        total += sum(
            1024 * int(found) for found in re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+) kB", text)
        )
    return total


def megabytes(extra_bytes: dict[str, int | None]) -> dict[str, float]:
    """Converts {name: bytes} to megabytes. Leaves out names whose memory is not known (None)."""
    return {name: value / 1e6 for name, value in extra_bytes.items() if value is not None}


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None
    return 1024 * int(match.group(1))


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what a result depends on: device, threads, versions, date and commit."""
    return {
        "device": device_name(device),
        **({"cpu": cpu_generation()} if device.type == "cpu" else {}),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit_of(Path(__file__).parent),
    }


def device_name(device: torch.device) -> str:
    """Returns the model name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpuinfo("model name")
    return name or platform.processor() or platform.machine()


def cpu_generation() -> str:
    """Returns family and model of the CPU, which tell generations of one name apart.

    AMD: family 25 is Zen 3 or Zen 4, family 26 is Zen 5. Also names the instructions for bf16.
    """
    numbers = [f"{name.removeprefix('cpu ')} {_cpuinfo(name)}" for name in ("cpu family", "model")]
    return ", ".join([*numbers, cpu_bf16() or "no bf16"])


def _cpuinfo(name: str) -> str:
    """Returns an entry of the first core, "" where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{name}\s*:\s*(.+)", text, re.MULTILINE)
    return match.group(1) if match else ""


def cache_size(device: torch.device) -> int:
    """Returns the bytes of the last-level cache, 32 MB where the system does not tell."""
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


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a checkout, with + if files were changed. None outside a checkout.

    New rows in `benchmarks/results` are no change.
    """

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )

    try:
        commit = git("describe", "--always", "--exclude=*")
        code = (":(top)", ":(top,exclude)benchmarks/results")
        changed = git("diff", "--quiet", "HEAD", "--", *code).returncode
    except OSError:
        return None
    return None if commit.returncode else commit.stdout.strip() + "+" * bool(changed)
