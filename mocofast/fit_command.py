"""The command fit: does a recipe fit a GPU?"""

from __future__ import annotations

from collections.abc import Sequence

from mocofast.config import ConfigError
from mocofast.parser import Parser, add_run_settings, given_settings


def fit(argv: Sequence[str]) -> int:
    """peak memory of a recipe's step on a GPU, and settings that fit"""
    parser = Parser(
        prog="mocofast fit",
        usage="mocofast fit [RECIPE] [--gpu NAME | --memory GB] [--ranks N] [--OPTION VALUE ...]",
        description="Predicts the peak memory of a training step without a GPU, and proposes "
        "activation checkpointing,\nsharding and micro-batches until the step fits. "
        "With --train.device cpu: on this machine. docs/cluster.md says what is not counted.",
        often=("--gpu", "--memory", "--ranks"),
        examples=(
            "mocofast fit moco_v3_vit_l --gpu H100 --ranks 64",
            "mocofast fit moco_v3_vit_b --memory 24 --data.batch_size 512",
        ),
    )
    parser.add_argument("recipe", nargs="?", help="a recipe, as of pretrain")
    parser.add_argument(
        "--gpu", metavar="NAME", default="", help="H100, A100-80, RTX4090, ... [H100]"
    )
    parser.add_argument("--memory", metavar="GB", type=float, default=0.0, help="GiB of a GPU")
    parser.add_argument("--ranks", metavar="N", type=int, default=1, help="number of GPUs [1]")
    add_run_settings(parser, argv)
    arguments = parser.parse(argv)
    if arguments.gpu and arguments.memory:
        raise ConfigError("--gpu and --memory: expected one of the two")
    if arguments.memory < 0 or arguments.ranks < 1:
        raise ConfigError("--memory and --ranks: expected positive numbers")
    from mocofast.device import faster_in_bf16, memory_bytes
    from mocofast.train import configure
    from mocofast.train import fit as module

    given = {"data.path": ".", **given_settings(arguments)}
    config = configure.configure(arguments.recipe, "", given)
    on_cpu, gpu = config.train.device == "cpu", arguments.gpu or "H100"
    machine = memory_bytes() if on_cpu and not arguments.gpu else None
    memory = arguments.memory or (machine / module.GIB if machine else module.memory_of(gpu))
    if config.train.precision == "auto":
        old = gpu.upper() in module.WITHOUT_BF16 and not arguments.memory
        if on_cpu:
            config.train.precision = "bf16" if faster_in_bf16(config) else "fp32"
        else:
            config.train.precision = "fp16" if old else "bf16"
    for line in module.report(config, arguments.ranks, memory, given_settings(arguments)):
        print(line, flush=True)
    return 0
