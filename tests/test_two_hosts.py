"""Two hosts: network namespaces with an address each, and torchrun on both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_launch import lines

ROOT = Path(__file__).parents[1]
WORDS = ("digits", "--train.epochs", "2", "--train.log_every", "1", "--knn.start", "false")


def ip(*words: str) -> None:
    """Runs `ip`. Skips the test where namespaces are not allowed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Yields two hosts with a cable between them, as (namespace, interface, address)."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need the command `ip` (iproute2)")
    names = [f"moco{os.getpid()}{letter}" for letter in "ab"]
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        a, b = names
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        found = []
        for number, name in enumerate(names, 1):
            address = f"10.77.0.{number}"
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
            found.append((name, "cable", address))
        yield found
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start(words: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a program with this checkout on its path."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "benchmarks"))
    return subprocess.Popen(
        words,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", *words)


def on_both(hosts: list[tuple[str, str, str]], words: tuple[str, ...]) -> list[tuple[int, str]]:
    """Runs `mocofast WORDS` on both hosts. Returns (exit status, output) of each."""
    running = []
    for number, (name, interface, address) in enumerate(hosts):
        node = torchrun(
            *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"{hosts[0][2]}:29411", "--rdzv-id", "job"),
            *("--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", address),
        )
        inside = ("ip", "netns", "exec", name)
        command = (*inside, *node, "-m", "mocofast", *words)
        running.append(start(command, {"GLOO_SOCKET_IFNAME": interface}))
    try:
        outputs = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, output) for process, output in zip(running, outputs)]


def test_the_same_run_as_on_one_host(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    ended = on_both(hosts, ("pretrain", *WORDS, "--train.dir", str(tmp_path / "two")))
    assert [status for status, _ in ended] == [0, 0], ended
    words = ("-m", "mocofast", "pretrain", *WORDS, "--train.dir", str(tmp_path / "one"))
    alone = start(torchrun("--standalone", "--nproc-per-node", "2", *words), {})
    output, _ = alone.communicate(timeout=200)
    assert alone.returncode == 0, output
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


def test_the_doctor_measures_the_network(hosts: list[tuple[str, str, str]]) -> None:
    (status, output), (other, _) = on_both(hosts, ("doctor", "--network"))
    assert (status, other) == (0, 0), output
    assert "rank 1" in output and "10.77.0.2 (cable)" in output
    assert "GB/s" in output and "us" in output
