"""A task of SkyPilot, which rents machines of a cloud and replaces machines that are taken away."""

from __future__ import annotations

import re
from typing import Any

from mocofast.interrupts import EXIT_INTERRUPTED
from mocofast.launch.request import HEADER, Request
from mocofast.launch.torchrun import torchrun

PORT = 29500
_GIB = {"M": lambda n: -(-n // 1024), "G": lambda n: n, "T": lambda n: 1024 * n}  # by unit


def task(request: Request) -> str:
    """Returns a task for `sky jobs launch`: a managed job on spot machines.

    The run folder must lie in storage that outlives the machines (`--train.dir` in a bucket that
    a user's `file_mounts` mount), or a replaced machine starts anew.
    """
    from mocofast.launch.document import dump  # here, so that `--help` loads no YAML

    options = request.options
    resources: dict[str, Any] = {
        "cpus": f"{options.cpus * options.processes}+",
        "use_spot": True,
        "job_recovery": {
            "max_restarts_on_errors": options.restarts,
            "recover_on_exit_codes": [EXIT_INTERRUPTED],
        },
    }
    if options.gpus:
        resources["accelerators"] = f"{options.gpu_kind}:{options.gpus}"
    if options.memory:
        number, unit = re.findall("[0-9]+|[MGT]", options.memory)
        resources["memory"] = f"{_GIB[unit](int(number))}+"
    if options.image:
        resources["image_id"] = f"docker:{options.image}"
    address = f'$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{PORT}'
    start = torchrun(request, address, "SKYPILOT_NODE_RANK", options.restarts)
    content: dict[str, Any] = {
        "name": options.name,
        "num_nodes": options.nodes,
        "resources": resources,
        "run": f"{request.setup}exec {start}\n",
    }
    return f"# {HEADER} sky\n{dump(content)}"
