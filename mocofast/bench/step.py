"""One optimiser step of ours beside the reference's loop, a strong eager baseline and lightly's building blocks, all
with the same encoder, weights and images; and what its parts take, next to the encoders alone.

The floor, "encoders only", is the forward and backward of the query encoder and the forward of the key encoder in our
step's precision on images that are prepared already.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mocofast.bench import timing
from mocofast.bench.kernels import matrix_product
from mocofast.bench.sides import MODES, SIDES, Step, encoders_only, parts_of_a_step
from mocofast.config import Config, ConfigError
from mocofast.engine import choose_mode
from mocofast.settings import apply, load_recipe, validate

RECIPE = "moco_v2_r50_200ep"
SMALL = {"model.arch": "resnet18_cifar", "augment.size": 32, "data.batch_size": 32, "model.queue_size": 4096}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The model and its sizes."""
    add_model_arguments(parser, positive, SMALL)
    parser.add_argument(
        "--modes",
        nargs="*",
        choices=MODES,
        default=MODES,
        help="engine modes to time beside the one that training takes (default: all; compiling takes minutes)",
    )
    parser.set_defaults(repeats=5)


def add_model_arguments(
    parser: argparse.ArgumentParser, positive: Callable[[str], int], small: dict[str, Any]
) -> None:
    """The recipe and what may differ from it. small: settings on a CPU where no recipe is asked for."""
    sizes = ", ".join(f"{name.split('.')[1]} {value}" for name, value in small.items())
    parser.add_argument("--recipe", help=f"whose model and batch (default: {RECIPE}; on a CPU with {sizes})")
    parser.add_argument("--arch", dest="model.arch", help="encoder, in place of the recipe's")
    parser.add_argument("--size", dest="augment.size", type=positive, help="side of a view, in pixels")
    parser.add_argument("--batch", dest="data.batch_size", type=positive, help="images in a step")
    parser.add_argument(
        "--queue", dest="model.queue_size", type=positive, help="negative keys, a multiple of --batch"
    )


def configured(arguments: argparse.Namespace, device: torch.device, small: dict[str, Any]) -> Config:
    """The configuration that `add_model_arguments` describe, in one process; ConfigError where none can use it."""
    config = load_recipe(arguments.recipe or RECIPE)
    if arguments.recipe is None and device.type != "cuda":
        apply(config, small)
    apply(config, {name: value for name, value in vars(arguments).items() if "." in name and value is not None})
    if config.model.queue_size % config.data.batch_size:
        raise ConfigError(
            f"--queue must be a multiple of --batch, which the reference demands: got {config.model.queue_size} keys "
            f"and {config.data.batch_size} images"
        )
    return config


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device = timing.resolved(arguments.device)
    config = configured(arguments, device, SMALL)
    config.data.path = config.data.path or "."  # validate wants one; nothing is read
    validate(config)
    torch.backends.cudnn.benchmark = True  # as the reference sets it; for all sides

    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    mode, why = choose_mode(config.engine.mode, device, world_size=1)
    left_out = {f"engine {other}" for other in MODES if other == mode or other not in arguments.modes}
    for name, build in SIDES.items():
        if name in left_out:
            continue
        try:
            steps[name] = build(config, device)
        except (ImportError, ConfigError) as error:
            skipped[name] = str(error)
    memory = {name: timing.in_fresh_process(memory_of, name, config, str(device)) for name in steps}
    steps["encoders only"] = encoders_only(config, device)
    with FlopCounterMode(display=False) as counter:
        steps["encoders only"]()
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    parts = parts_of_a_step(config, device)
    everything = {**steps, **parts, "matrix product": matrix_product(side, dtype, device)}
    times = timing.interleaved(everything, arguments.repeats, device)
    matrix_rate = 2 * side**3 / times.pop("matrix product").median
    waits = {name: host_synchronisations(step) for name, step in steps.items() if name in memory}

    batch, ours = config.data.batch_size, times["mocofast"].median
    floor = times["encoders only"].median
    breakdown = {name: times.pop(name).median for name in parts}
    breakdown["other"] = ours - sum(breakdown.values())
    flops = counter.get_total_flops()
    print(
        f"{config.model.arch}, {config.augment.size} px, batch {batch}, queue {config.model.queue_size}, "
        f"{'two-layer' if config.model.mlp else 'linear'} head"
    )
    print(
        f"{timing.device_name(device)}; matrix rate {matrix_rate / 1e9:.0f} GFLOP/s, encoders {flops / 1e9:.1f} GFLOP"
    )
    print(f"mocofast: engine {mode}, {why}")
    print(f"{'':16}{'images/s':>10}{'ms':>10}{'quartiles':>20}{'ours is x':>11}{'extra MB':>10}{'waits':>7}")
    for name, time in times.items():
        quartiles = f"{1e3 * time.low:.1f} - {1e3 * time.high:.1f}"
        line = (
            f"{name:16}{batch / time.median:10.1f}{1e3 * time.median:10.1f}{quartiles:>20}{time.median / ours:11.2f}"
        )
        extra = memory.get(name)
        print(line + (f"{extra / 1e6:10.1f}" if extra is not None else f"{'':10}") + f"{waits.get(name, ''):>7}")
    for name, reason in skipped.items():
        print(f"{name:16}skipped: {reason}")
    print(f"parts of our step: {', '.join(f'{name} {value / ours:.0%}' for name, value in breakdown.items())}")
    return {
        "benchmark": "step",
        **timing.environment(device),
        "recipe": config.recipe,
        "engine": mode,
        "arch": config.model.arch,
        "size": config.augment.size,
        "batch_size": batch,
        "queue_size": config.model.queue_size,
        "repeats": arguments.repeats,
        "images_per_second": {name: round(batch / time.median, 2) for name, time in times.items()},
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "quartiles": {name: [round(1e3 * t, 4) for t in time[1:]] for name, time in times.items()},
        "speedup": {name: round(times[name].median / ours, 3) for name in memory},
        "over_encoders_only": round(ours / floor, 3),
        "extra_bytes": memory,
        "breakdown_milliseconds": {name: round(1e3 * value, 4) for name, value in breakdown.items()},
        "host_synchronisations": waits,
        "encoder_flops": flops,
        "gflops": round(flops / ours / 1e9, 1),
        "matrix_gflops": round(matrix_rate / 1e9, 1),
        "skipped": skipped,
    }


# ---- memory and waits ----


def memory_of(name: str, config: Config, device: str) -> int | None:
    """Peak extra bytes of one step of a side: beyond weights, optimiser state, queue and the images."""
    where = torch.device(device)
    step = SIDES[name](config, where)
    step()  # loads code, makes momenta
    return timing.peak_extra_memory(step, where)


class HostSynchronisations(TorchDispatchMode):
    """Counts the calls that make the host wait for a device, which on a CPU only would."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        to_host = name == "_to_copy" and result.device.type == "cpu" and args[0].device.type != "cpu"
        self.count += name in self.WAITING or to_host
        return result


def host_synchronisations(step: Step) -> int:
    """How often a steady step waits for its device."""
    step()
    with HostSynchronisations() as waits:
        step()
    return waits.count
