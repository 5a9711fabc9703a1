"""The number of threads of a run: which networks get several, and what a continued run takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mocofast import settings
from mocofast.config import Config
from mocofast.data.loaders import count_workers
from mocofast.device import choose_threads
from mocofast.models.encoders import build_encoder
from mocofast.openmp import waits_briefly
from mocofast.train import threads
from mocofast.train.threads import operations, set_threads
from mocofast.usage import cores_of_others, usage
from tests.runs import environment

CPU = torch.device("cpu")
CORES = count_workers(-1)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(arch: str, size: int) -> Config:
    changed = settings.load_recipe("digits")
    changed.model.arch, changed.augment.size, changed.data.batch_size = arch, size, 32
    return changed


def encoder(c: Config) -> nn.Module:
    return build_encoder(c.model.arch, c.augment.size, c.data.channels)(num_classes=16)


def test_all_cores_compute_where_threads_sleep_and_a_network_is_large() -> None:
    assert choose_threads(8, sleeping=True, large=True) == 8
    assert choose_threads(8, sleeping=True, large=False) == 1
    assert choose_threads(8, sleeping=False, large=True) == 4
    assert choose_threads(1, sleeping=False, large=False) == 1


def test_only_large_networks_get_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(threads, "cores_of_others", lambda _: 0.0)
    networks = (("resnet_tiny", 8, 1), ("vit_micro_cifar", 16, 1), ("resnet18", 64, CORES))
    for arch, size, expected in networks:
        c = config(arch, size)
        network = encoder(c).train()
        set_threads(network, c, CPU)
        assert torch.get_num_threads() == expected
        assert network.training
        assert threads.at_least(network, c) <= operations(network, c)
        assert operations(network, c) <= threads.at_most(network, c)


def test_operations_are_counted_only_between_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def count(network: nn.Module, c: Config) -> int:
        counted.append(c.model.arch)
        return operations(network, c)

    monkeypatch.setattr(threads, "operations", count)
    c = config("resnet18", 64)  # 11 M weights, 32 images
    for images, large, asked in ((512, True, []), (32, True, ["resnet18"]), (1, False, [])):
        c.data.batch_size = images
        c.augment.size = 64 if images > 1 else 8
        counted.clear()
        assert threads.is_large(encoder(c), c) == large
        assert counted == asked


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_a_large_network_leaves_cores_to_busy_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    c = config("resnet18", 64)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(CORES)]
    try:
        while cores_of_others(0.1) < 1:
            pass
        said = set_threads(encoder(c), c, CPU)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert torch.get_num_threads() == CORES // 2
    assert f"computes on {CORES // 2} of {CORES} cores: other processes use" in said[0]
    # A small network looks at nobody.
    monkeypatch.setattr(threads, "cores_of_others", lambda _: pytest.fail("looked"))
    small = config("resnet_tiny", 8)
    assert set_threads(encoder(small), small, CPU) == []
    assert torch.get_num_threads() == 1


def test_this_process_is_none_of_the_others() -> None:
    began = usage()
    if began is None:
        pytest.skip("the system does not tell")
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = usage()
    assert after is not None
    assert after.own - began.own == pytest.approx(0.3, abs=0.1)
    assert after.busy - began.busy >= 0.2
    assert 0 <= cores_of_others(0.1) <= (os.cpu_count() or 1) + 0.5


def test_the_operations_of_a_network_are_those_of_its_layers() -> None:
    c = config("resnet18", 224)
    # 1.82 G multiply-adds an image (He et al. 2015, arXiv:1512.03385, table 1), 2 operations each.
    assert operations(encoder(c), c) == pytest.approx(32 * 2 * 1.82e9, rel=0.02)


def test_waiting_threads_sleep_soon_only_if_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not waits_briefly()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert waits_briefly()
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")  # GNU OpenMP's own variable wins
    assert not waits_briefly()
    for spins in ("0", "1000"):
        monkeypatch.setenv("GOMP_SPINCOUNT", spins)
        assert waits_briefly()


def test_a_continued_run_keeps_its_number_and_a_users_number_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    c = config("resnet18", 64)
    network = encoder(c)
    set_threads(network, c, CPU, saved={"threads": 3})
    assert torch.get_num_threads() == 3
    set_threads(network, c, CPU, saved={})  # by a version that took half of the cores
    assert torch.get_num_threads() == max(1, CORES // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    set_threads(network, c, CPU, saved={"threads": 3})
    assert torch.get_num_threads() == max(1, CORES // 2)


def test_the_command_asks_for_sleeping_threads_before_torch_loads() -> None:
    code = (
        "import os, sys\n"
        "from mocofast import cli\n"
        "assert 'torch' not in sys.modules\n"
        "cli.COMMANDS['doctor'] = lambda _: 0\n"
        "cli.main(['doctor'])\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    )
    for chosen, expected in (
        ({}, ["passive", "1000"]),
        ({"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7"}, ["active", "7"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment(), **chosen},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == expected


def test_a_checkpoint_holds_the_number(tmp_path: Path) -> None:
    from mocofast.train.checkpoint import load_checkpoint
    from mocofast.train.run import train

    c = settings.load_recipe("digits")
    settings.apply(c, {"train.max_steps": 1, "train.dir": str(tmp_path), "knn.start": False})
    train(c)
    assert load_checkpoint(tmp_path)["threads"] == torch.get_num_threads()
    assert operations(encoder(c), c) < threads.WORTH
