"""Helpers for tests that run the command line: real processes, small data, few steps.

As a script, `python runs.py ARGS...` runs `mocofast ARGS...` with `PlainEncoder` under the name
`resnet_tiny`. Some claims hold without BatchNorm only, because the statistics of BatchNorm depend
on how a batch is divided.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # seconds of a command
# Metrics that differ from run to run.
TIMES = {"images_per_second", "data_wait", "memory_gib"}


class PlainEncoder(nn.Module):
    """Convolution, pooling and a linear layer. No layer mixes the images of a batch."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(images)).mean((2, 3)))


def environment() -> dict[str, str]:
    """Returns variables that select this checkout's packages and one thread.

    With more threads, several processes would compete for two cores.
    """
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def mocofast(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `mocofast ARGS` in a process of its own.

    The process is a fork of a process that has imported PyTorch (tests/conftest.py says what). A
    new Python needs seconds for the imports.

    check: raises AssertionError if the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_command, args=(arguments, streams, environment())
        )
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, TIMEOUT)
        texts = [stream.read_text(encoding="utf-8") for stream in streams]
    done = subprocess.CompletedProcess(["mocofast", *arguments], process.exitcode, *texts)
    return _checked(done, check)


def _command(arguments: list[str], streams: list[Path], variables: Mapping[str, str]) -> None:
    """Runs a command in this process. streams: the files of standard output and standard error."""
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = ["mocofast", *arguments]
    from mocofast import cli

    sys.exit(cli.main())


def torchrun(
    processes: int, *arguments: str, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `torchrun --nproc-per-node N -m mocofast ARGS`.

    script: the path of a script to run instead of the module.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return _run([*launcher, *([script] if script else ["-m", "mocofast"]), *arguments], True)


def compiled(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGS` with Triton's compiler, even if this process interprets kernels.

    variables: additional environment variables.
    """
    inherited = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=inherited | variables, capture_output=True, text=True, check=False
    )


def _run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIMEOUT,
        cwd=ROOT,
    )
    return _checked(done, check)


def _checked(
    done: subprocess.CompletedProcess[str], check: bool
) -> subprocess.CompletedProcess[str]:
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without the metrics that depend on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    """Returns the model's state dict from a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


def assert_same_run(got: Path, expected: Path) -> None:
    """Asserts equal metrics, and weights that are equal to the bit."""
    assert metrics(got) == metrics(expected)
    ours, theirs = weights(got), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def make_images(folder: Path, count: int, classes: int = 2, side: int = 24) -> Path:
    """Writes `count` JPEG files of smooth random colours into class folders, and returns `folder`.

    Images of a class look alike.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        label = i % classes
        path = folder / f"class{label}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 128, (4, 4, 3)) + 127 * np.eye(3, dtype=np.int64)[label % 3]
        pixels = np.kron(coarse, np.ones((side // 4, side // 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(path, quality=90)
    return folder


if __name__ == "__main__":
    from mocofast import cli
    from mocofast.models import encoders

    encoders.TinyResNet = PlainEncoder  # type: ignore[assignment,misc]
    sys.exit(cli.main())
