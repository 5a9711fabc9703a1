"""A job of SLURM, made and submitted by submitit: https://github.com/facebookincubator/submitit."""

from __future__ import annotations

import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mocofast import interrupts
from mocofast.config import ConfigError
from mocofast.launch.request import Request

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission


@dataclass(frozen=True)
class Rank:
    """A rank of a job, which submitit pickles, and calls in every process that `srun` starts.

    words: the words after `mocofast pretrain`, with `--resume auto`.
    """

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Trains. Exits with the status of the training, if the training has not reached its end.

        mocofast answers signals meanwhile: all ranks end after a step, and rank 0 writes a
        checkpoint. Rank 0 then asks for the next job, after SIGUSR1 and SIGUSR2 by submitit's own
        handler of the signal. After SIGTERM alone, SLURM refuses the next job if a user has
        cancelled the job, and starts the next job after a pre-emption.
        """
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        # mocofast chooses the GPU by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with interrupts.watching() as watch:
            status = _pretrain(self.words)
        job = JobEnvironment()
        if job.global_rank == 0 and (status == interrupts.EXIT_INTERRUPTED or status > 128):
            if watch.received & {signal.SIGUSR1, signal.SIGUSR2}:
                signal.raise_signal(signal.Signals[f"SIG{job.USR_SIG}"])  # exits
            elif job.cluster == "slurm":
                subprocess.run(["scontrol", "requeue", "incomplete", job.job_id], check=False)
        if status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """Returns what the next job calls: the same, since `--resume auto` finds the checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _pretrain(words: tuple[str, ...]) -> int:
    """Runs `python -m mocofast pretrain`. Returns the exit status, 128 + N after a signal N."""
    sys.argv = ["mocofast", "pretrain", *words]
    try:
        runpy.run_module("mocofast", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except interrupts.Stopped as stop:
        return 128 + stop.number
    return 0


def _executor(request: Request) -> Any:
    """Returns submitit's executor with the options of a request.

    SLURM sends SIGUSR2 `deadline` seconds before the end of the job's time.

    Raises ConfigError without submitit, and for `flags` that are not options with two dashes.
    """
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise ConfigError(
            "slurm needs the package submitit. pip install 'mocofast[slurm]' installs it"
        ) from error

    class Anywhere(SlurmExecutor):
        """Writes scripts on machines without SLURM, too."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    options = request.options
    made = Anywhere(
        options.out,
        max_num_timeout=options.restarts,
        # The environment of `setup` has its own Python.
        python="python" if options.setup else shlex.quote(sys.executable),
    )
    made.update_parameters(
        job_name=options.name,
        nodes=options.nodes,
        ntasks_per_node=options.processes,
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus or None,
        # sbatch knows G and no Gi, and means 1,024 MiB.
        mem=options.memory.rstrip("i") or None,
        time=_minutes(options.time),
        signal_delay_s=options.deadline,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, **_flags(options.flags)},
        setup=[
            *filter(None, [options.setup]),
            "# Signals to the script wait until the ranks have ended.",
            "trap : TERM USR1 USR2",
        ],
        # The first rank that ends does not end the others, since rank 0 still writes the
        # checkpoint. srun takes neither the cores nor the mode of logs from sbatch.
        srun_args=[
            "--kill-on-bad-exit=0",
            f"--wait={options.deadline}",
            f"--cpus-per-task={options.cpus}",
            "--open-mode=append",
        ],
    )
    return made


def script(request: Request) -> str:
    """Returns the batch script that submitit submits. The errors are those of `submit`."""
    made = _executor(request)
    return str(made._make_submission_file_text(made._submitit_command_str, ""))


def submit(request: Request) -> int:
    """Submits the job. Returns 0.

    The folder `out` gets submitit's files: the batch script, the pickled rank, and a log a rank.

    Raises ConfigError without submitit or sbatch, for `flags` that are not options with two dashes,
    for an `out` that is a file, and if sbatch refuses the job.
    """
    made = _executor(request)
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch: no such command on this machine")
    try:
        job = made.submit(Rank(request.words))
    except FileExistsError as error:
        raise ConfigError(f"--out: {request.options.out} is a file, expected a folder") from error
    except RuntimeError as error:  # FailedJobError, FailedSubmissionError
        raise ConfigError(f"sbatch: {error}") from error
    print(f"job {job.job_id}: {job.paths.submission_file}, logs of ranks beside it", flush=True)
    return 0


def _minutes(time: str) -> int:
    """Returns the minutes of a time of SLURM, such as 90, 24:00:00, 2-00 or 1-12:30."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # DAYS-HOURS[:MINUTES[:SECONDS]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MINUTES[:SECONDS]
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def _flags(text: str) -> dict[str, str | bool]:
    """Returns {name: value, or True without a value} of options of sbatch."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--flags: {error}: {text}") from error
    found: dict[str, str | bool] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError(
                f"--flags: expected options such as --partition=gpu or --exclusive, got {word!r}"
            )
        found[name] = value if equals else True
    return found
