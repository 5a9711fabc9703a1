"""A job: a file in the language of a cluster engine, and the command that submits the file."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mocofast.config import Config, ConfigError
from mocofast.launch import kubernetes, ray, skypilot, slurm
from mocofast.launch.request import HEADER, LaunchConfig, Request


class Engine(NamedTuple):
    """A cluster engine.

    suffix: how the names of its files, or of submitit's folder for SLURM, end.
    text: returns the content of a file.
    submit: the words before the name of the file in the command that submits the file.
    """

    suffix: str
    text: Callable[[Request], str]
    submit: tuple[str, ...]


ENGINES = {
    "slurm": Engine(".slurm", slurm.script, ("sbatch",)),
    "k8s": Engine(".k8s.yaml", kubernetes.manifest, ("kubectl", "apply", "-f")),
    "sky": Engine(".sky.yaml", skypilot.task, ("sky", "jobs", "launch", "-y")),
    "ray": Engine(".ray.py", ray.program, ("python",)),
}


def checked(options: LaunchConfig, words: list[str], config: Config) -> Request:
    """Returns the request of a command line.

    words: the words after `mocofast pretrain`. config: the configuration that they describe.

    Raises ConfigError for a name or a batch that the engine cannot use.
    """
    processes = options.processes or options.gpus or 1
    if options.gpus and processes > options.gpus:
        raise ConfigError(
            f"--processes: {processes} processes need {processes} GPUs a machine, and --gpus is "
            f"{options.gpus}"
        )
    ranks = options.nodes * processes
    if config.data.batch_size % ranks:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size} images are not divisible among {ranks} "
            f"processes ({options.nodes} nodes x {processes})"
        )
    # Kubernetes allows these characters alone.
    name = options.name or re.sub("[^a-z0-9]+", "-", config.recipe.lower()).strip("-")
    if not re.fullmatch("[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", name):
        raise ConfigError(
            f"--name: expected up to 50 lower-case letters, digits and hyphens, got {name!r}"
        )
    for option, value, form, example in (
        ("--memory", options.memory, "([1-9][0-9]*[MGT]i?)?", "64G or 64Gi"),
        ("--time", options.time, "([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "24:00:00 or 2-00"),
    ):
        if not re.fullmatch(form, value):
            raise ConfigError(f"{option}: expected a value such as {example}, got {value!r}")
    folder = [] if config.train.dir else ["--train.dir", f"runs/{name}"]
    return Request(
        replace(options, name=name, processes=processes),
        (*words, *folder, "--resume", "auto"),
    )


def launch(engine: str, request: Request, dry_run: bool) -> int:
    """Writes the file of a job, and submits the file. Returns the exit status of the submission.

    SLURM's job is written and submitted by submitit.

    dry_run: print the file and the command. Write and submit nothing.
    Raises ConfigError if a file of another origin has the name, or the engine's command is missing.
    """
    suffix, text, submit = ENGINES[engine]
    out = request.options.out or request.options.name + suffix
    request = replace(request, options=replace(request.options, out=out))
    content = text(request)
    path = Path(out)
    command = [*submit, out]
    if dry_run:
        said = "sbatch, by submitit" if engine == "slurm" else shlex.join(command)
        print(f"{content}\n# submit: {said}")
        return 0
    if engine == "slurm":  # submitit writes the file
        return slurm.submit(request)
    if path.exists() and (not path.is_file() or HEADER not in path.read_text("utf-8")[:200]):
        raise ConfigError(f"--out: {path} exists, and `mocofast launch` did not write it")
    path.write_text(content, encoding="utf-8")
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: no such command on this machine. {path} is written: submit it where "
            f"{command[0]} is, by `{shlex.join(command)}`"
        )
    print(f"{path}: {shlex.join(command)}", flush=True)
    return subprocess.run(command, check=False).returncode
