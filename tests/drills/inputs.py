"""Damaged recipes, checkpoints and command lines: `python -m tests.drills.inputs [--minutes 10]`.

Every command ends by itself, with a status of docs/reliability.md and with words, whatever a
recipe, a checkpoint or its arguments hold. Commands run in forks of this process, with a limit on
memory and time. A defect is printed with its seed, and `--seed` repeats the case.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mocofast import cli, settings
from mocofast.config import ConfigError
from mocofast.errors import printable
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.run import train
from tests.drills.mutate import EXTREMES, mutated, run_fuzzer
from tests.pictures import save_photos

CPU_SECONDS = 40  # of a command. Valid options may ask for more, and count apart
MEMORY = 16 * 2**30  # bytes of addresses
ENDS = {0: "done", 2: "refused", 74: "refused by the system", 76: "diverged"}
QUIET = {"knn.every": 0, "knn.start": False, "train.device": "cpu", "data.workers": 0}
SHORT = [*settings.as_flags(QUIET), "--train.max_steps", "2"]

NUMBERS = ("0", "-1", "1", "3", "1e3", "-1e-9", "1e300", "1e400", "nan", "inf", "9" * 30)
TEXTS = ("", " ", "-", "--", "none", "auto", "true", "caf\xe9", "\udcff", "\x1b[2J", "[1", "{a: b}")
LISTS = (",", "1,2", "1,,2", "0.1,0.9", "(3,4)", "1,2,3,4,5,6,7,8,9", "a,b", "-1,-1")
PLACES = (".", "..", "nowhere/at/all", "*", "{0..3}.tar", "file:///", "http://127.0.0.1:9/x.tar")
WORDS = (*NUMBERS, *TEXTS, *LISTS, *PLACES, "x" * 5000)
COMMANDS = (
    "pretrain digits --train.dir {out}",
    "pretrain {images} --train.dir {out}",
    "pretrain --resume {run}",
    "pretrain digits --train.dir {out} --init {run}",
    "knn {run}",
    "linear {run} --linear.epochs 1",
    "finetune {run} --finetune.epochs 1",
    "zeroshot {run} --data.path {images}",
    "detect {run} --data.path {images}",
    "segment {run} --data.path {images}",
    "views --recipe digits --out {out}.png",
    "report {run} --out {out}.html",
    "embed {run} {images} {out}.npy",
    "predict {run} {images}/000.jpg",
    "compare {run} {run} --out {out}.png",
    "sweep digits --dir {out} --grid optim.lr 0.1",
    "export {run} --format torchvision {out}.pt",
    "prepare {images} {out}",
    "stats {images}",
    "launch slurm digits",
    "fit digits",
    "doctor {run}",
    "main_moco {images}/none",
    "main_lincls {images}/none",
)
# Words at the end of a command line, whose options win: runs are short, nothing is submitted.
ENDINGS = {"pretrain": SHORT, "sweep": SHORT, "launch": ["--dry-run"]}


class Place(NamedTuple):
    """The folders of a drill: a run of two steps, images, and a folder for what is written."""

    run: Path
    images: Path
    out: Path
    state: dict[str, Any]  # the run's checkpoint


def prepare_place(folder: Path) -> Place:
    folder.mkdir()
    place = Place(folder / "run", save_photos(folder / "images", 6), folder / "out", {})
    config = settings.load_recipe("digits")
    values = {"train.dir": str(place.run), "train.max_steps": 2, "model.queue_size": 256, **QUIET}
    settings.apply(config, values)
    train(config)
    return place._replace(state=load_checkpoint(place.run))


# ---- a command in a process of its own ----


def outcome(words: list[str], folder: Path) -> str:
    """Runs `mocofast WORDS` in a fork. Returns what happened, with DEFECT where it may not."""
    said = folder / "said"
    if not (process := os.fork()):
        _command(words, folder, said)
    _, status = os.waitpid(process, 0)
    code, text = os.waitstatus_to_exitcode(status), said.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    if "Traceback (most recent call last)" in text:
        return f"DEFECT: a traceback, {printable(lines[-1])[:200]}"
    if code == -signal.SIGXCPU:
        return f"works longer than {CPU_SECONDS} s"
    if code in ENDS or (code == 1 and words[0] == "doctor"):
        return ENDS.get(code, "damage found")
    return f"DEFECT: status {code}, {printable(lines[-1])[:200]}"


def _command(words: list[str], folder: Path, said: Path) -> None:
    """The fork. Does not return."""
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        signal.alarm(20 * CPU_SECONDS)
        code = cli.main(words)
    except SystemExit as end:  # of a parser
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# ---- the cases ----


def damaged_recipe(place: Path, rng: random.Random, _: Place) -> str:
    """Reads a shipped recipe with damaged bytes, or with odd values."""
    shipped = resources.files("mocofast") / "recipes" / f"{rng.choice(settings.recipes())}.yaml"
    content = shipped.read_bytes()
    if rng.random() < 0.5:
        content = mutated(content, rng)
    else:
        lines = content.decode().splitlines()
        for _number in range(rng.randint(1, 4)):
            at = rng.randrange(len(lines))
            name, colon, _value = lines[at].partition(":")
            new = (f"{name}{colon} {rng.choice(WORDS)}", lines[at] + "\n" + lines[at], "", "  x: 1")
            lines[at] = rng.choice(new)
        content = "\n".join(lines).encode(errors="surrogateescape")
    path, begun = place / "recipe.yaml", time.process_time()
    path.write_bytes(content)
    try:
        config = settings.load_recipe(str(path))
        settings.validate(config)
        again = settings.from_dict(settings.to_dict(config))
    except ConfigError as error:
        if len(str(error)) > 1000:
            return f"DEFECT: a message of {len(str(error))} characters"
        return "refused"
    if time.process_time() - begun > 5:
        return f"DEFECT: takes {time.process_time() - begun:.0f} s"
    return "read" if again == config else "DEFECT: another configuration when written and read"


def damaged_words(place: Path, rng: random.Random, given: Place) -> str:
    """Runs a command line with odd, missing, repeated or damaged words, and random options."""
    names = {"run": given.run, "images": given.images, "out": given.out}
    command, *words = [word.format(**names) for word in rng.choice(COMMANDS).split()]
    known = [s for group, kind in settings.groups().items() for s in settings.settings(group, kind)]
    for _number in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(words) or 1), rng.randrange(6)
        if kind <= 2:
            setting = rng.choice(known)
            words += [f"--{setting.name}", _fitting(setting, rng) if kind else _value(rng)]
        elif kind == 3 and words:
            words[at] = rng.choice(WORDS)
        elif kind == 4 and words:
            words[at : at + 1] = rng.choice(([], [words[at]] * 2))
        elif words:
            damaged = mutated(words[at].encode(errors="surrogateescape") or b"x", rng)
            words[at] = os.fsdecode(damaged.replace(b"\0", b"0").replace(b"/", b"_"))
    line = [command, *words, *ENDINGS.get(command, [])]
    what = outcome(line, place)
    return f"{what} of: {printable(shlex.join(line))[:300]}" if "DEFECT" in what else what


def _value(rng: random.Random) -> str:
    return rng.choice((rng.choice(WORDS), str(rng.choice(EXTREMES)), f"{rng.uniform(-2, 2):.3f}"))


def _fitting(setting: settings.Setting, rng: random.Random) -> str:
    """Returns a value of the option's kind, near its default."""
    value = setting.default
    if setting.choices:
        return rng.choice(setting.choices)
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, (int, float)):
        kind, factor = type(value), rng.choice((0, 0.5, 1, 2, 10, -1))
        return str(kind(value * factor) + rng.choice((0, 0, 1)))
    if isinstance(value, tuple) and value:
        return settings.shown(rng.choices(value, k=len(value) + rng.choice((0, 0, 1, -1))))
    return rng.choice(WORDS)


def damaged_bytes(place: Path, rng: random.Random, given: Place) -> str:
    """Continues from a checkpoint with damaged bytes: refused, or read as written."""
    file = place / "run" / "checkpoints" / "last.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(mutated((given.run / "checkpoints" / "last.pt").read_bytes(), rng))
    try:
        state = load_checkpoint(place / "run")
    except (ConfigError, FileNotFoundError):
        return "refused"
    same = all(torch.equal(state["model"][k], v) for k, v in given.state["model"].items())
    return "whole" if same and state["step"] == 2 else "DEFECT: other values"


def damaged_entries(place: Path, rng: random.Random, given: Place) -> str:
    """Runs commands on a checkpoint with wrong or missing entries."""
    state, changed = copy.deepcopy(given.state), []
    for _number in range(rng.randint(1, 3)):
        holder, key = _entry(state, rng)
        changed.append(key)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = _other(holder[key], rng)
    folder = place / "run"
    shutil.copytree(given.run, folder)
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    torch.save(state, folder / "checkpoints" / "last.pt")
    commands = (
        ["pretrain", "--resume", str(folder), "--train.max_steps", "4"],
        ["knn", str(folder / "checkpoints" / "last.pt")],
        ["export", str(folder), "--format", "torchvision", "out.pt"],
        ["embed", str(folder), str(given.images), "out.npy"],
        ["report", str(folder)],
        ["doctor", str(folder)],
    )
    words = rng.choice(commands)
    what = outcome(words, place)
    return f"{what} of {words[0]}, changed: {changed}" if "DEFECT" in what else what


def _entry(state: dict[str, Any], rng: random.Random) -> tuple[Any, Any]:
    """Returns a container of a nested state, and the key of one of its entries."""
    holder: Any = state
    while True:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            return holder, key
        holder = inner


def _other(value: Any, rng: random.Random) -> Any:
    """Returns another value: an odd number, another kind, a tensor of another shape or numbers."""
    odd: list[Any] = [None, -1, 10**13, float("nan"), "x", "", [], {}, True, [[[]]], torch.ones(2)]
    if isinstance(value, torch.Tensor) and value.numel() and rng.random() < 0.7:
        odd = [value.flatten()[:-1], value.double(), value[None], value.to(torch.uint8)]
        if value.is_floating_point():
            odd.append(torch.full_like(value, float("nan")))
    elif isinstance(value, (int, float)) and rng.random() < 0.5:
        odd = [value + 1, -value, value * 10**6, str(value), [value]]
    return rng.choice(odd)


CASES: dict[str, tuple[Callable[[Path, random.Random, Place], str], int]] = {
    "recipe": (damaged_recipe, 8),  # and how many of a round
    "checkpoint's bytes": (damaged_bytes, 4),
    "checkpoint's entries": (damaged_entries, 2),
    "command line": (damaged_words, 3),
}


def cases(first: int, most: int, until: float) -> Iterator[tuple[int, str]]:
    """Yields seeds and cases, until the time has come."""
    round_of = [name for name, (_, count) in CASES.items() for _number in range(count)]
    for number in range(most):
        if time.monotonic() > until:
            return
        seed = first + number
        yield seed, round_of[seed % len(round_of)]


def main(minutes: float, seed: int, most: int = 10**9) -> Counter[str]:
    """Runs the drill, prints and returns the counts."""
    torch.set_num_threads(1)  # a process that forks must not have more
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        given = prepare_place(Path(name) / "given")
        until = time.monotonic() + 60 * minutes
        for number, kind in cases(seed, most, until):
            place = Path(name) / "case"
            place.mkdir()
            try:
                what = CASES[kind][0](place, random.Random(number), given)
            except Exception as error:
                what = f"DEFECT: {type(error).__name__}: {str(error)[:200]}"
            if "DEFECT" in what:
                what = f"seed {number}: {what}"
                print(f"{kind}: {what}", flush=True)
            counts[f"{kind}: {what}"] += 1
            shutil.rmtree(place)
            shutil.rmtree(given.out, ignore_errors=True)
    print(f"inputs: {counts.total()} cases, {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(run_fuzzer(main, __doc__, 10.0))
