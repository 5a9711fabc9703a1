"""A program of Ray Train, which starts the ranks on the machines of a Ray cluster."""

from __future__ import annotations

import json
import os

from mocofast.launch.request import HEADER, Request


def program(request: Request) -> str:
    """Returns a Python program. Ray's own options of a cluster apply (`RAY_ADDRESS`).

    The ranks work in the folder of the launch, which all machines must share. (Ray's workers
    start in folders of their own, and would write the run there.)
    """
    options = request.options
    workers = options.nodes * options.processes
    words = "".join(f"    {json.dumps(word)},\n" for word in request.words)
    return f'''\
"""{HEADER} ray"""

import os

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

FOLDER = {json.dumps(os.getcwd())}
WORDS = [
{words}]


def pretrain():
    """Runs one rank. Ray has made its process group. An error makes Ray start all ranks again."""
    from mocofast.cli import main

    os.chdir(FOLDER)
    if status := main(["pretrain", *WORDS]):
        raise RuntimeError(f"mocofast pretrain: exit status {{status}}")


TorchTrainer(
    pretrain,
    torch_config=TorchConfig(backend="{"nccl" if options.gpus else "gloo"}"),
    scaling_config=ScalingConfig(
        num_workers={workers},
        use_gpu={bool(options.gpus)},
        resources_per_worker={{"CPU": {options.cpus}{', "GPU": 1' if options.gpus else ""}}},
    ),
    run_config=RunConfig(
        name="{options.name}", failure_config=FailureConfig(max_failures={options.restarts})
    ),
).fit()
'''
