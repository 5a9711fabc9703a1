"""``mocofast doctor``: shows what this machine has, and how every part of mocofast will use it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mocofast.errors import ConfigError, describe_error, torchvision_way_out

GIB = 2**30


class Finding(NamedTuple):
    """A row of the table: a part of mocofast or of the machine."""

    part: str
    use: str  # version, hardware, or chosen path
    why: str  # reason, and what to install; may be empty


def report() -> list[Finding]:
    """Returns all findings, in reading order. Never raises: a failing probe is a finding, too."""
    findings = []
    for part, probe in _PROBES.items():
        try:
            findings += [Finding(part, use, why) for use, why in probe()]
        except Exception as error:
            findings.append(Finding(part, "unknown", f"the check failed: {describe_error(error)}"))
    return findings


def table(findings: list[Finding], width: int) -> str:
    """Returns the findings in aligned columns, the last column wrapped. width: in characters."""
    first, second = (max(len(finding[i]) for finding in findings) for i in (0, 1))
    indent = first + second + 4
    lines = []
    for part, use, why in findings:
        wrapped = textwrap.wrap(why, max(width - indent, 30)) or [""]
        lines.append(f"{part:<{first}}  {use:<{second}}  {wrapped[0]}".rstrip())
        lines += [" " * indent + rest for rest in wrapped[1:]]
    return "\n".join(lines)


def main(run: str | None = None) -> int:
    """Prints the table. Returns an exit status, 1 if a file is damaged.

    run: a run folder to check instead of the machine.
    """
    findings = report() if run is None else report_on_run(Path(run))
    print(table(findings, shutil.get_terminal_size((120, 24)).columns))
    return 1 if any(finding.use == DAMAGED for finding in findings) else 0


DAMAGED = "damaged"


def report_on_run(folder: Path) -> list[Finding]:
    """Returns a finding for every checkpoint, and for the other files of a run folder.

    Raises NotADirectoryError if there is no such folder, ConfigError if it is no run folder.
    """
    from mocofast.health.folder import evidence_of
    from mocofast.health.verdict import diagnose, verdict
    from mocofast.train.checkpoint import check_counts, checked, load_checkpoint
    from mocofast.train.run_folder import whole_lines

    def check(state: Any, file: Path) -> dict[str, Any]:
        state = state if _of_a_task(state) else checked(state, file)
        check_counts(state)
        return state

    if not folder.is_dir():
        raise NotADirectoryError(f"there is no run folder {str(folder)!r}")
    findings = []
    for file in sorted((folder / "checkpoints").glob("*.pt")):
        try:
            state = load_checkpoint(file, check, whole=False)
        except ConfigError as error:
            findings.append(Finding(file.name, DAMAGED, str(error)))
        else:
            where = f"step {state['step']}, epoch {state['epoch']} + {state['step_in_epoch']} steps"
            if "parts" in state:
                where += f"; sharded: {state['parts']['folder']}"
            findings.append(Finding(file.name, "whole", where))
    if not findings:
        raise ConfigError(f"{folder} has no checkpoints, so it is no run folder")
    if not (folder / "checkpoints" / "last.pt").exists():
        why = "--resume takes the newest whole step file"
        findings.append(Finding("last.pt", "missing", why))
    for name in ("metrics.jsonl", "skipped.jsonl"):
        if (folder / name).exists():
            lines, bad = whole_lines(folder / name)
            why = f"{bad} lines cannot be read; --resume sets the lines aside" if bad else ""
            findings.append(
                Finding(name, DAMAGED if bad else "whole", why or f"{len(lines)} lines")
            )
    if (folder / "signals.jsonl").exists():
        try:
            evidence = evidence_of(folder)
        except ConfigError:  # the finding on metrics.jsonl tells why
            return findings
        noticed = diagnose(evidence)
        use = noticed[0].name if noticed else "no problem"
        findings.append(Finding("verdict", use, verdict(evidence)))
    return findings


def _of_a_task(state: Any) -> bool:
    """Returns whether this is a checkpoint of mocofast detect or segment, a kind of its own."""
    return isinstance(state, dict) and str(state.get("format")).startswith("mocofast ")


# Probes import their modules themselves: a failing import then is a single finding. Probes call the
# functions that make the choices in a run, and repeat no choice here.
Rows = Iterator[tuple[str, str]]


def _mocofast() -> Rows:
    try:
        version = importlib.metadata.version("mocofast")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"  # imported from a checkout
    yield version, f"imported from {Path(__file__).parent}"


def _python() -> Rows:
    yield platform.python_version(), f"{sys.executable} on {platform.platform()}"


def _torch() -> Rows:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield torch.__version__, build


def _gpus() -> Rows:
    if not torch.cuda.is_available():
        why = (
            "torch finds no CUDA device: no NVIDIA GPU, or no driver for it (see nvidia-smi)"
            if torch.version.cuda
            else "this torch cannot use a GPU; for CUDA install torch from https://pytorch.org"
        )
        yield "none", why
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            gpu.name,
            f"cuda:{index}, {gpu.total_memory / GIB:.0f} GiB, "
            f"compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs",
        )


def _auto_device() -> torch.device:
    from mocofast.device import choose_device

    return choose_device("auto")


def _device() -> Rows:
    device, gpus = _auto_device(), torch.cuda.device_count()
    if device.type == "cpu":
        yield "cpu", "no CUDA device"
    elif gpus == 1:
        yield str(device), "the GPU"
    else:
        yield (
            str(device),
            "one process uses one GPU; for all GPUs: "
            f"torchrun --nproc-per-node {gpus} -m mocofast pretrain",
        )


def _precision() -> Rows:
    from mocofast.device import choose_autocast, cpu_bf16

    device = _auto_device()
    if device.type == "cpu" and (instructions := cpu_bf16()):
        yield (
            "bf16",
            f"for ResNets and ViTs, because this CPU has {instructions}; fp32 for other encoders "
            "(docs/precision.md)",
        )
    elif choose_autocast("auto", device)._enabled:
        yield "bf16", "autocast, because this GPU supports bf16"
    elif device.type == "cuda":
        yield "fp32", "this GPU does not support bf16 (compute capability below 8.0)"
    else:
        yield (
            "fp32",
            "this CPU has no instructions for bf16 (AMX or AVX512-BF16), and is slow without",
        )


def _engine() -> Rows:
    from mocofast.train.engine import choose_mode

    yield choose_mode("auto", _auto_device(), world_size=1)


def _missing(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return bool(parent and _missing(parent)) or importlib.util.find_spec(module) is None


def _triton() -> Rows:
    if _missing("triton"):
        linux = platform.system() == "Linux"
        yield "not installed", "pip install triton" if linux else "Triton has Linux wheels only"
    else:
        triton = importlib.import_module("triton")
        yield triton.__version__, "compiles the fused kernels for GPUs (not used on a CPU)"


def _fused_ops() -> Rows:
    from mocofast.ops import backend

    device = _auto_device()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing Triton, see below
        kernels = backend.backend_for(device.type)
    if kernels.infonce_forward.__module__ != "mocofast_kernels.cpu":
        yield "Triton kernels", "the device is a GPU"
    elif device.type == "cuda":
        yield (
            "blocked PyTorch",
            "slower, because Triton is missing: pip install triton",
        )
    else:
        yield "blocked PyTorch", "no CUDA device; computes the same in one pass over the queue"


def _dali() -> Rows:
    from mocofast.data.loaders import dali_missing

    missing = dali_missing()
    if missing and platform.system() != "Linux":
        yield "not installed", "DALI has Linux wheels only"
    elif missing:
        extra = "cuda12" if (torch.version.cuda or "").startswith("12") else "cuda13"
        yield "not installed", f"faster on photos: pip install 'mocofast[{extra}]' ({missing})"
    else:
        dali, backend = (
            importlib.import_module(name) for name in ("nvidia.dali", "nvidia.dali.backend")
        )
        if _auto_device().type == "cpu":
            yield dali.__version__, "decodes on the CPU: no CUDA device"
        elif backend.GetCUDADeviceCount():
            yield dali.__version__, "decodes on the GPU"
        else:
            yield (
                dali.__version__,
                "finds no GPU, but torch does; is the wheel for another CUDA version?",
            )


def _loader() -> Rows:
    from mocofast.data.loaders import dali_missing

    if not dali_missing():
        yield (
            "dali",
            "for image files; small images in memory (digits, CIFAR) use the device loader",
        )
    elif _missing("torchvision"):
        yield "device", f"for the digits; image files need torchvision: {torchvision_way_out()}"
    else:
        yield "torchvision", "DALI cannot be imported"


def _view_operators() -> Rows:
    from mocofast.data.photometric import compiled

    operators, why = compiled()
    if operators is None:
        yield "PyTorch", f"on a CPU about 5 times slower than compiled operators; {why}"
    else:
        yield "compiled", f"for views on a CPU, {why}; equal to PyTorch's operators to the bit"


def _crops() -> Rows:
    from mocofast.data.resize import compiled

    for bits, dtype, slower in ((8, torch.uint8, 2), (16, torch.uint16, 8)):
        functions, why = compiled(dtype)
        if functions is None:
            yield "PyTorch", f"resizes {bits} bits on a CPU, {slower} times slower; {why}"
        else:
            yield "compiled", f"resizes {bits} bits on a CPU, {why}; equal to PyTorch's to the bit"


def _compiled_ops() -> Rows:
    from mocofast_kernels import cpu_convolution, cpu_sweep
    from mocofast_kernels.cpu_library import library

    types = (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for name, dtype in types:
        sweep, why = cpu_sweep.compiled(dtype)
        if sweep is None:
            yield "PyTorch", f"info_nce on a CPU, {name} products; {why}"
        else:
            yield "compiled", f"info_nce on a CPU, {name} products, {why}"
    for name, dtype in types:
        kind, why = cpu_convolution.kind_of(dtype)
        if kind is not None:
            yield "compiled", f"convolutions on a CPU, {name}, {why}"
        else:
            yield "PyTorch", f"convolutions on a CPU, {name}; {why}"
    found, why = library()
    if found is None:
        yield (
            "PyTorch",
            f"steps of optimisers on a CPU take 1.3 times as long; {why}",
        )
    else:
        yield (
            "compiled",
            "steps of optimisers and moving averages on a CPU, in a pass over memory",
        )


def _nvimgcodec() -> Rows:
    if _missing("nvidia.nvimgcodec"):
        yield "not installed", "would find damaged files for the DALI loader; installed with DALI"
    else:
        codec = importlib.import_module("nvidia.nvimgcodec")
        yield codec.__version__, "finds damaged files in batches that DALI cannot decode"


def _distributed() -> Rows:
    if not torch.distributed.is_available():
        yield "none", "this torch has no torch.distributed: runs are limited to one process"
        return
    backends = [
        name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()
    ]
    chosen = "nccl" if _auto_device().type == "cuda" else "gloo"
    yield ", ".join(backends) or "none", f"runs of several processes use {chosen}"


def _cpu() -> Rows:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield (
        f"{usable} cores",
        f"of {os.cpu_count()}; torch computes on {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )


def _memory() -> Rows:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # limit of the container
    text = limit.read_text().strip() if limit.exists() else "max"
    if text != "max" and int(text) < total:
        yield (
            f"{int(text) / GIB:.0f} GiB",
            f"the container's limit; the machine has {total / GIB:.0f} GiB",
        )
    else:
        yield f"{total / GIB:.0f} GiB", ""


_PROBES: dict[str, Callable[[], Rows]] = {
    "mocofast": _mocofast,
    "Python": _python,
    "torch": _torch,
    "GPU": _gpus,
    "CPU": _cpu,
    "memory": _memory,
    "device": _device,
    "precision": _precision,
    "engine": _engine,
    "Triton": _triton,
    "fused ops": _fused_ops,
    "ops on CPUs": _compiled_ops,
    "DALI": _dali,
    "data loader": _loader,
    "view operators": _view_operators,
    "crops": _crops,
    "nvImageCodec": _nvimgcodec,
    "torch.distributed": _distributed,
}
