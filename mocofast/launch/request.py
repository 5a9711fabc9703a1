"""What a user asks of a cluster engine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from mocofast.option import at_least, option

HEADER = "written by mocofast launch"  # a later launch replaces files with this line alone


@dataclass
class LaunchConfig:
    """The options of `mocofast launch`."""

    nodes: int = option(1, "number of machines", valid=at_least(1))
    gpus: int = option(8, "GPUs of a machine; 0 trains on CPUs", valid=at_least(0))
    processes: int = option(
        0, "processes on a machine; 0 means one a GPU, or one without GPUs", valid=at_least(0)
    )
    cpus: int = option(8, "CPU cores of a process", valid=at_least(1))
    memory: str = option("", "memory of a machine, such as 64G or 64Gi")
    name: str = option("", "name of the job, the run folder and the file; empty takes the recipe's")
    time: str = option("24:00:00", "slurm: longest time of a job; the run continues in the next")
    deadline: int = option(
        120, "seconds that a warned run has to write its checkpoint", valid=at_least(1)
    )
    restarts: int = option(
        100,
        "restarts before the job fails; slurm: only ends of a job's time count",
        valid=at_least(0),
    )
    setup: str = option("", "shell commands before the training, such as 'source env/bin/activate'")
    image: str = option("", "k8s, sky: container image that has mocofast; k8s needs one")
    volume: str = option("", "k8s: CLAIM:FOLDER, a volume for images and run folders")
    gpu_kind: str = option("H100", "sky: kind of GPU")
    flags: str = option("", "slurm: more options of sbatch, such as --flags='--partition=gpu'")
    out: str = option("", "the file to write, slurm: the folder; empty takes the name of the job")


@dataclass(frozen=True)
class Request:
    """A checked request: the options, and the command that every rank runs.

    options: with a name, and at least one process. `launch` sets `out`.
    words: the words after `mocofast pretrain`, with the run folder and `--resume auto`.
    """

    options: LaunchConfig
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """Returns the module and the words of every rank, quoted for a shell."""
        return shlex.join(["mocofast", "pretrain", *self.words])

    @property
    def setup(self) -> str:
        """Returns the user's commands as lines of a script, each with its end of line."""
        return f"{self.options.setup}\n" if self.options.setup else ""
