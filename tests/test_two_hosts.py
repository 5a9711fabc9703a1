"""Two hosts: network namespaces with an address, and torchrun in the two namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.runs_to_kill import last_step
from tests.test_launch import lines

ROOT = Path(__file__).parents[1]
PATIENCE = 400.0  # seconds
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


def begin(hosts: list[tuple[str, str, str]], words: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """Starts `mocofast WORDS` on the two hosts."""
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
    return running


def ended(running: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Waits for the ends. Returns pairs (exit status, output)."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, output) for process, output in zip(running, outputs)]


def on_both(hosts: list[tuple[str, str, str]], words: tuple[str, ...]) -> list[tuple[int, str]]:
    """Runs `mocofast WORDS` on the two hosts. Returns pairs (exit status, output)."""
    return ended(begin(hosts, words), PATIENCE)


def on_one(words: tuple[str, ...]) -> tuple[str, int]:
    """Runs `mocofast pretrain WORDS` with two ranks on one host. Returns (output, exit status)."""
    words = ("--standalone", "--nproc-per-node", "2", "-m", "mocofast", "pretrain", *words)
    alone = start(torchrun(*words), {})
    return alone.communicate(timeout=PATIENCE)[0], alone.returncode


def test_the_same_run_as_on_one_host(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    done = on_both(hosts, ("pretrain", *WORDS, "--train.dir", str(tmp_path / "two")))
    assert [status for status, _ in done] == [0, 0], done
    output, status = on_one((*WORDS, "--train.dir", str(tmp_path / "one")))
    assert status == 0, output
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


def test_the_doctor_measures_the_network(hosts: list[tuple[str, str, str]]) -> None:
    (status, output), (other, _) = on_both(hosts, ("doctor", "--network"))
    assert (status, other) == (0, 0), output
    assert "rank 1" in output and "10.77.0.2 (cable)" in output
    assert "GB/s" in output and "us" in output


LONG = ("--train.epochs", "12", "--checkpoint.every_steps", "10")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of two ranks on one host."""
    folder = tmp_path_factory.mktemp("whole")
    output, status = on_one((*WORDS, *LONG, "--train.dir", str(folder)))
    assert status == 0, output
    return folder


def cut(host: tuple[str, str, str], folder: Path) -> None:
    """Takes a host off the network after step 20."""
    deadline = time.monotonic() + PATIENCE
    while last_step(folder) < 20:
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)
    ip("-n", host[0], "link", "set", host[1], "down")


@pytest.mark.slow
@pytest.mark.parametrize("second", [0, 1])
def test_a_host_that_is_cut_off_for_half_a_minute_delays_the_run(
    hosts: list[tuple[str, str, str]], whole: Path, tmp_path: Path, second: int
) -> None:
    folder = tmp_path / "cut"
    running = begin(hosts, ("pretrain", *WORDS, *LONG, "--train.dir", str(folder)))
    cut(hosts[second], folder)
    time.sleep(30)
    before = last_step(folder)
    ip("-n", hosts[second][0], "link", "set", "cable", "up")
    assert before < 132
    done = ended(running, PATIENCE)
    assert [status for status, _ in done] == [0, 0], done
    assert lines(folder) == lines(whole)


@pytest.mark.slow
@pytest.mark.parametrize("second", [0, 1])
def test_of_a_host_that_stays_cut_off_the_other_ends_and_both_continue(
    hosts: list[tuple[str, str, str]], whole: Path, tmp_path: Path, second: int
) -> None:
    folder = tmp_path / "cut"
    words = ("pretrain", *WORDS, *LONG, "--train.dir", str(folder), "--resume", "auto")
    for name, *_ in hosts:  # TCP gives up after 100 s, as docs/cluster.md tells
        ip("netns", "exec", name, "sh", "-c", "echo 8 > /proc/sys/net/ipv4/tcp_retries2")
    running = begin(hosts, (*words, "--train.hang_after", "20"))
    cut(hosts[second], folder)
    done = ended(running, PATIENCE)
    assert 0 not in [status for status, _ in done], done
    assert "hanging: rank" in done[1 - second][1], done
    ip("-n", hosts[second][0], "link", "set", "cable", "up")
    done = on_both(hosts, words)
    assert [status for status, _ in done] == [0, 0], done
    assert lines(folder) == lines(whole)
