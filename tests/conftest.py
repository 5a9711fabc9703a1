"""Shared fixtures. Tests on real images are skipped unless MOCOFAST_DATA names their folder."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import tarfile
from pathlib import Path

import hypothesis
import pytest
import torch

# CI takes the same examples every time, and a failure points at the change. Everywhere else
# hypothesis tries new examples.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

torch.set_num_threads(min(2, torch.get_num_threads()))
if not torch.cuda.is_available():
    # Set before any test module imports torchvision, which imports triton: `triton.jit` reads the
    # variable once.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes of tests are forks of a process that has imported these. A thread each: a process that
# forks must not have more, and the processes of a test compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
multiprocessing.set_forkserver_preload(
    ["torch.distributed", "torch.utils.tensorboard", "torchvision", "matplotlib.figure", "yaml"]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the long drills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    long_drill = pytest.mark.skip(reason="a long drill; runs with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(long_drill)


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks measure in this process. New processes take seconds, and have own tests."""
    monkeypatch.setattr(
        "mocofast_bench.timing.in_fresh_process", lambda measure, *arguments: measure(*arguments)
    )


def _unpacked(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = os.environ.get("MOCOFAST_DATA")
    if not root or not (Path(root) / archive).exists():
        pytest.skip(
            f"set MOCOFAST_DATA to the folder that holds {archive} to run this test on real images"
        )
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    out = folder / archive.split(".")[0]
    with (folder / f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            with tarfile.open(Path(root) / archive) as tar:
                tar.extractall(folder / f"{out.name}.part", filter="data")
            (folder / f"{out.name}.part").rename(out)
    return out


@pytest.fixture(scope="session")
def cases() -> Path:
    """Returns the folder of small files of many fields, which is not in the repository."""
    root = Path(os.environ.get("MOCOFAST_CASES", Path(__file__).parents[2] / "shared" / "cases"))
    if not root.is_dir():
        pytest.skip(f"set MOCOFAST_CASES to the folder of cases ({root} is not there)")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a flat folder of 500 full-size JPEG photos. Some photos are grayscale."""
    return _unpacked("imagenet-sample-500.tar", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar10_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of CIFAR-10 as JPEG files.

    The files are train/<class>/NNNN.jpg (50,000) and test/<class>/NNNN.jpg (10,000).
    """
    return _unpacked("cifar10-jpeg.tar.xz", tmp_path_factory)
