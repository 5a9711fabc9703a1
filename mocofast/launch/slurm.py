"""A batch script of SLURM: srun starts the ranks, and a stopped run enters the queue again."""

from __future__ import annotations

import shlex

from mocofast.config import ConfigError
from mocofast.interrupts import EXIT_INTERRUPTED
from mocofast.launch.request import HEADER, Request


def script(request: Request) -> str:
    """Returns a script for sbatch.

    srun starts every rank by itself, without torchrun, so the exit status of the ranks is kept.
    SLURM warns the ranks by SIGUSR1 before the end of the job's time, and by SIGTERM before a
    pre-emption. Warned ranks write a checkpoint and end with status 75. The script then asks
    for the next job, which continues.

    Raises ConfigError for `flags` with an open quote.
    """
    options = request.options
    directives = [
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.processes}",
        f"--cpus-per-task={options.cpus}",
        *([f"--gpus-per-node={options.gpus}"] if options.gpus else []),
        # sbatch knows G and no Gi, and means 1,024 MiB.
        *([f"--mem={options.memory.rstrip('i')}"] if options.memory else []),
        f"--time={options.time}",
        f"--signal=USR1@{options.deadline}",
        "--requeue",
        "--open-mode=append",
        f"--output={options.name}-%j.log",
        *map(shlex.quote, _words(options.flags)),
    ]
    lines = "\n".join(f"#SBATCH {directive}" for directive in directives)
    return f"""\
#!/usr/bin/env bash
# {HEADER} slurm
{lines}
{request.setup}export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Signals to the script wait until the ranks have ended.
trap : TERM USR1
# The first rank that ends does not end the others, since rank 0 still writes the checkpoint.
srun --kill-on-bad-exit=0 --wait={options.deadline} --cpus-per-task={options.cpus} \\
    --open-mode=append --output={options.name}-%j-%t.log \\
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' \\
    rank python -m {request.command}
status=$?
if [ "$status" -eq {EXIT_INTERRUPTED} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _words(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ConfigError(f"--flags: {error}: {flags}") from error
