"""Dying and new machines: `python -m tests.drills.elastic [--count 50]`.

A machine is a process with torchrun's agent (`--nnodes 1:4`) and a rank. All processes are forks
of this process, which has imported the modules of a run: no time below holds imports. In turns
there are 4, 1, 3 and 2 machines. A machine dies by SIGKILL to agent and rank. When machines come,
a running rank is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from mocofast_bench.processes import free_port
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from mocofast import cli, distributed
from mocofast.train import loop
from tests import runs
from tests.drills.kills import PATIENCE, continued
from tests.drills.runs_to_kill import EVERY, Figures, saved_step, words

MACHINES = (4, 1, 3, 2)
EACH = 40  # steps for a turn, some of which are left for the end
PACE = 0.2  # seconds between steps: no turn may see the end of the run
OPTIONS = {"model.bn_splits": 4, "model.queue_size": 320, "data.batch_size": 32}
OPTIONS |= {"train.log_every": 10}
# Seconds: a machine without a word for DEAD is dead. A start waits MORE for more machines, unless
# there are 4.
DEAD, MORE = 2, 1
HURRY = "hurry"  # a file to end the pauses
FORK = multiprocessing.get_context("fork")


@dataclass
class Seen:
    """A step of a rank, noted at the end."""

    step: int
    ranks: int
    began: float  # time.time() at the start of the rank
    cpu: float  # seconds of the rank since then
    at: float  # time.time()
    images: dict[str, int]  # {place in the batch: CRC-32 of the views}


def note_steps(folder: Path, trains: bool) -> None:
    """Lets every step of this process write a line to a new file in `folder`.

    trains: False repeats the result of the first step, to note the data alone.
    """
    began, first = time.time(), []
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)
    plain = loop.Engine.step

    def step(engine: Any, views: Any, fields: Any, learns: Any, shares: Any) -> Any:
        if trains or not first:
            first[:] = [plain(engine, views, fields, learns, shares)]
        rank, ranks = distributed.rank_and_world_size()
        sums = [zlib.crc32(b"".join(v.numpy().tobytes() for v in image)) for image in zip(*views)]
        places = map(str, shares.rows(rank).tolist())
        line = Seen(
            engine.number, ranks, began, time.process_time(), time.time(), dict(zip(places, sums))
        )
        file.write(json.dumps(vars(line)) + "\n")
        if trains and not (folder / HURRY).exists():
            time.sleep(PACE)
        return first[0]

    def set_scheduled(engine: Any, step: int, total: int, rate: float) -> None:
        engine.number = step + 1
        schedule(engine, step, total, rate)

    schedule = loop.Engine.set_scheduled
    loop.Engine.step, loop.Engine.set_scheduled = step, set_scheduled


def seen(folder: Path) -> list[Seen]:
    """Returns the steps of all ranks until now, by time."""
    found = []
    for path in folder.glob("*.jsonl"):
        whole, _, _ = path.read_text().rpartition("\n")  # a killed rank leaves a part of a line
        found += [Seen(**json.loads(line)) for line in whole.splitlines()]
    return sorted(found, key=lambda each: each.at)


def train(folder: Path, steps: int, trains: bool = True) -> int:
    """Trains as a rank, or notes the data of a run without ranks.

    The output goes to the end of a file beside the folder.
    """
    log = folder.with_suffix(".log").open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = log  # under pytest the two are no longer streams 1 and 2
    note_steps(folder.with_name(f"{folder.name}-steps"), trains)
    options = {**OPTIONS, "train.epochs": -(-steps // 44), "train.max_steps": steps}
    status = cli.main(words(folder, **options))
    folder.with_suffix(".modules").write_text("\n".join(sys.modules))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent may stop a rank at the end
    if status:
        sys.exit(status)
    return 0


def machine(port: int, folder: Path, steps: int, dead: int, more: int) -> None:
    """Runs torchrun's agent for a rank."""
    os.setsid()
    # No machine can take over the store of a dead first machine (pytorch/pytorch#182221).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # For events torchrun looks up the caller's name in all modules, between a look at the store and
    # a write. Beside mocofast's modules the search took too long: another agent always wrote first.
    dynamic_rendezvous.get_method_name = lambda depth=2: ""
    settings = f"is_host=0,last_call_timeout={more}"
    settings += f",keep_alive_interval=1,keep_alive_max_attempt={dead}"
    words = ["--nnodes", "1:4", "--nproc-per-node", "1", "--max-restarts", "1000"]
    words += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-conf", settings]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "none"]
    config, _, _ = config_from_args(parse_args(words))
    elastic_launch(replace(config, start_method="fork"), train)(folder, steps)


class Drill:
    """A run on dying and new machines."""

    def __init__(
        self, place: Path, turns: int, seed: int, dead: int = DEAD, more: int = MORE
    ) -> None:
        self.folder, self.turns, self.steps = place / "elastic", turns, EACH * turns
        self.figures, self.kills, self.rng = Figures(), 0, random.Random(seed)
        self.own: list[float] = []  # seconds from the start of a rank to the end of the first step
        self.cpu: list[float] = []  # CPU seconds of the rank meanwhile
        self.port, self.waits = free_port(), (dead, more)
        self.machines: list[Any] = []
        self.notes = place / "elastic-steps"

    def start(self, count: int) -> None:
        """Starts machines until there are `count`."""
        while len(self.machines) < count:
            more = FORK.Process(
                target=machine, args=(self.port, self.folder, self.steps, *self.waits)
            )
            more.start()
            self.machines.append(more)

    def kill(self, count: int) -> None:
        """Kills machines until `count` are left, or a rank if machines come."""
        self.rng.shuffle(self.machines)
        dead = self.machines[count:]
        victims = [each for one in dead for each in (one.pid, *children(one.pid))]
        if not dead:
            victims = children(self.machines[0].pid)
        for process in victims:
            os.kill(process, signal.SIGKILL)
        for one in dead:
            one.join()
        self.machines = self.machines[:count]
        self.kills += len(dead) or 1

    def turn(self, count: int) -> bool:
        """Changes the number of machines by kills. Returns whether the run went on."""
        figures, log = self.figures, self.folder.with_suffix(".log")
        figures.faults += 1
        before, starts, killed = saved_step(self.folder), len(continued(log)), time.time()
        self.kill(count)
        reached = seen(self.notes)[-1].step
        self.start(count)
        if (first := self.next_step(killed, count)) is None:
            return False
        figures.survived += 1
        figures.seconds.append(first.at - killed)
        self.own.append(first.at - first.began)
        self.cpu.append(first.cpu)
        at = min(continued(log)[starts:] or [0])  # 0: killed before the first checkpoint
        figures.beyond += at < before
        figures.most_lost = max(figures.most_lost, reached - at)
        return True

    def next_step(self, after: float, count: int, more: int = 0) -> Seen | None:
        """Waits for a step on `count` machines after a moment, and `more` steps after this step."""
        deadline = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < deadline:
            found = [each for each in seen(self.notes) if each.at > after and each.ranks == count]
            if found and found[-1].step >= found[0].step + more:
                return found[0]
            time.sleep(0.05)
        return None

    def run(self) -> Figures:
        """Makes the turns, lets the run end, and compares the run with `whole`."""
        alone = (self.folder.with_name("whole"), self.steps, False)
        whole = FORK.Process(target=train, args=alone)
        whole.start()
        whole.join()
        load(self.folder.with_name("whole.modules"))
        store = TCPStore("127.0.0.1", self.port, is_master=True, wait_for_workers=False)
        try:
            self.start(MACHINES[0])
            counts = itertools.cycle(MACHINES)
            went_on = self.next_step(0, next(counts)) is not None
            for count, _ in zip(counts, range(self.turns)):
                now = len(self.machines)
                more = self.rng.randrange(1, EVERY + 5)
                went_on = went_on and self.next_step(time.time(), now, more) and self.turn(count)
                if not went_on:
                    break
                print(self.line(), flush=True)
            (self.notes / HURRY).touch()
            for each in self.machines:
                each.join(PATIENCE)
            self.figures.finished += all(each.exitcode == 0 for each in self.machines)
            self.figures.equal += self.figures.finished and self.same_data()
        finally:
            for each in self.machines:
                for process in (each.pid, *children(each.pid)) if each.is_alive() else ():
                    os.kill(process, signal.SIGKILL)
                each.join()
            del store
        return self.figures

    def same_data(self) -> bool:
        """Returns whether every step saw the images and the rate of `whole`."""
        whole = self.folder.with_name("whole")
        expected = {each.step: each.images for each in seen(whole.with_name("whole-steps"))}
        got: dict[int, dict[str, int]] = {step: {} for step in expected}
        for each in seen(self.notes):
            got[each.step] |= each.images
            if not each.images.items() <= expected[each.step].items():
                return False
        ours, theirs = (
            [(line["step"], line["lr"]) for line in runs.metrics(each) if "lr" in line]
            for each in (self.folder, whole)
        )
        return got == expected and ours == theirs

    def line(self) -> str:
        own, cpu = median(self.own), median(self.cpu)
        return (
            f"{self.figures.line('machines')}, of which the ranks take {own:.1f} s ({cpu:.1f} s "
            f"of a CPU, at most {max(self.cpu):.1f}); {self.kills} kills"
        )


def load(modules: Path) -> None:
    """Imports the modules of a run. A module that no name imports was made by another module."""
    for name in modules.read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def children(process: int) -> list[int]:
    """Returns the processes that a process has started. [] after the end."""
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dead", type=int, default=DEAD, help="seconds until a machine is dead")
    parser.add_argument("--more", type=int, default=MORE, help="seconds of a start for others")
    parser.add_argument("--folder", type=Path, help="keep the run here")
    arguments = parser.parse_args()
    place = arguments.folder or Path(tempfile.mkdtemp(prefix="elastic-"))
    place.mkdir(parents=True, exist_ok=True)
    drill = Drill(place, arguments.count, arguments.seed, arguments.dead, arguments.more)
    good = drill.run().good()
    print(drill.line())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
