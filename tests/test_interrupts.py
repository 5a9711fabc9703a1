"""Signals, closed outputs and systems without Unix modules: every command ends cleanly."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mocofast import __main__, cli, interrupts, settings
from mocofast.evaluate.features import EvaluationStopped
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.train.run import train
from mocofast.train.run_folder import RunFolder
from tests import runs


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Starts `python -m mocofast ARGS`. Its standard error goes to standard output."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "mocofast", *arguments],
        env=runs.environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.ROOT,
        preexec_fn=_hears_ctrl_c,  # noqa: PLW1509 (no thread runs here)
    )


def _hears_ctrl_c() -> None:
    """Undoes what a shell does to jobs in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(process: subprocess.Popen[str], said: str) -> str:
    """Reads lines of a process up to a line with `said`."""
    assert process.stdout is not None
    out = ""
    for line in process.stdout:
        out += line
        if said in line:
            return out
    raise AssertionError(f"never said {said!r}:\n{out}")


# An encoder that takes minutes for its first evaluation of 300 images on a CPU.
SLOW = ("--model.arch", "tests.slow_encoder", "--augment.size", "224", "--data.workers", "0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_images(tmp_path_factory.mktemp("photos"), 300)


@pytest.mark.parametrize(
    ("number", "presses", "status"),
    [
        (signal.SIGINT, 1, 75),
        (signal.SIGTERM, 1, 75),
        (signal.SIGINT, 2, 130),
    ],
)
def test_a_signal_inside_an_evaluation_is_answered_and_obeyed(
    tmp_path: Path, images: Path, number: int, presses: int, status: int
) -> None:
    folder = tmp_path / "run"
    arguments = ("pretrain", "digits", "--data.path", str(images), "--train.dir", str(folder))
    process = start(*arguments, "--data.source", "folder", *SLOW)
    read_until(process, "time: about")
    time.sleep(2)  # the evaluation is under way
    for _ in range(presses):
        sent = time.monotonic()
        process.send_signal(number)
        out = read_until(process, "at once")
        assert time.monotonic() - sent < 2  # a second, and a second for a busy machine
    if status == 75:
        assert "stopping after this step; Ctrl-C again ends at once" in out
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == status, rest
    assert "Traceback" not in rest
    assert (folder / "checkpoints" / "last.pt").exists() == (status == 75)


def test_a_signal_outside_the_steps_ends_the_command() -> None:
    script = (
        "import sys, time\nfrom mocofast import cli, front\n"
        "def wait(argv):\n    print('begun', flush=True); time.sleep(60)\n"
        "sys.exit(front.run(dict.fromkeys(('pretrain', 'knn', 'sweep'), wait), sys.argv[1:]))"
    )
    for name, status in (("pretrain", 75), ("knn", 130), ("sweep", 130)):
        err = end_by_ctrl_c(script, name, status)
        assert f"mocofast {name}: stopped" in err
        assert (name == "sweep") == ("the same command continues" in err)


def test_a_signal_while_modules_load_ends_the_command() -> None:
    script = (
        "import sys, time\nfrom mocofast import __main__\n"
        "class Slow:\n    def find_spec(self, name, *_):\n"
        "        if name == 'mocofast.cli':\n"
        "            print('begun', flush=True); time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\nsys.exit(__main__.main())"
    )
    out = end_by_ctrl_c(script, "pretrain", 130)
    assert "mocofast: stopped" in out


def end_by_ctrl_c(script: str, name: str, status: int) -> str:
    """Starts Python code, presses Ctrl-C when it prints "begun", and returns its last words."""
    waiting = subprocess.Popen(
        [sys.executable, "-c", script, name],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hears_ctrl_c,  # noqa: PLW1509 (no thread runs here)
    )
    read_until(waiting, "begun")
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=10)
    assert waiting.returncode == status
    assert "Traceback" not in err
    return err


def test_a_run_that_stopped_in_an_evaluation_continues_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str) -> Any:
        config = settings.load_recipe("digits")
        settings.apply(
            config,
            {"train.dir": str(tmp_path / name), "train.epochs": 2, "knn.every": 1}
            | {"train.log_every": 4},
        )
        return train(config)

    assert not run("whole").interrupted
    evaluate: Callable[..., dict[str, float]] = KNNMonitor.evaluate
    calls = []

    def stop_the_second(*arguments: Any) -> dict[str, float]:
        calls.append(0)
        if len(calls) == 2:
            raise EvaluationStopped
        return evaluate(*arguments)

    monkeypatch.setattr(KNNMonitor, "evaluate", stop_the_second)
    stopped = run("in parts")
    assert stopped.interrupted and stopped.step == 11
    [command] = re.findall(r"^to continue: mocofast (.*)", capsys.readouterr().out, re.M)
    assert cli.main(shlex.split(command)) == 0
    runs.assert_same_run(tmp_path / "in parts", tmp_path / "whole")


def without_reader(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command whose standard output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "mocofast", *arguments],
        env=runs.environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    return done


@pytest.mark.parametrize("arguments", [("pretrain", "--help"), ("--help",), ("doctor",)])
def test_a_reader_that_leaves_is_no_error(arguments: tuple[str, ...]) -> None:
    done = without_reader(*arguments)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse ignores a closed output


def test_a_run_goes_on_without_its_reader(tmp_path: Path) -> None:
    arguments = ("--train.max_steps", "2", "--train.dir", str(tmp_path / "run"))
    done = without_reader("pretrain", *arguments)
    assert done.stderr == "standard output is closed; train.log has all lines\n"
    assert done.returncode == 0
    assert "step 2" in (tmp_path / "run" / "train.log").read_text()


def test_an_output_without_the_letters_of_a_name_is_no_error(tmp_path: Path) -> None:
    """The screen is of latin-1, as on Windows behind a pipe, and an image's name is not."""
    photos = runs.make_images(tmp_path / "photos", 40)
    (photos / "猫.jpg").write_bytes(b"\xff\xd8\xff damaged")
    words = ["pretrain", str(photos), "--train.dir", str(tmp_path / "run"), "--train.device", "cpu"]
    words += ["--train.max_steps", "1", "--data.workers", "0", "--data.loader", "torchvision"]
    words += ["--model.arch", "resnet_tiny", "--augment.size", "16", "--data.batch_size", "41"]
    command = [sys.executable, "-m", "mocofast", *words, "--knn.start", "false"]
    environment = runs.environment() | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    said = done.stdout.decode("latin-1") + done.stderr.decode("latin-1")
    assert done.returncode == 0, said
    assert said.count("\\u732b.jpg: ") == 1
    assert "猫.jpg: " in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


def test_the_log_of_a_run_needs_no_letters_of_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own users have no `main`, which makes the outputs take every letter."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    folder = RunFolder(tmp_path, settings.load_recipe("digits"), None)
    folder.write_skipped({"猫.jpg": "damaged"})
    folder.close()
    screen.flush()
    shown = screen.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert shown.endswith("\\u732b.jpg: damaged\n")


def test_every_module_imports_without_the_modules_of_unix() -> None:
    code = (
        "import sys, importlib, pkgutil\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'triton', 'nvidia.dali'):\n"
        "    sys.modules[name] = None\n"
        "import mocofast\n"
        "for module in pkgutil.walk_packages(mocofast.__path__, 'mocofast.'):\n"
        # ctypes loads _photometric. It is no module of Python.
        "    left_out = ('__main__', 'dali_loader', 'dali_pipeline', '_photometric')\n"
        "    if not module.name.endswith(left_out):\n"
        "        importlib.import_module(module.name)\n"
        "from mocofast.train.metrics import memory_gib\n"
        "import torch\n"
        "assert memory_gib(torch.device('cpu')) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        # As Windows sets it. Without a user's name in a variable PyTorch asks pwd.
        env=runs.environment() | {"USERNAME": "tester"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_signals_are_taken_where_pipes_have_no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows before Python 3.12, whose pipes may wait."""
    given: list[int] = []
    monkeypatch.delattr(os, "set_blocking")
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda number, **_: given.append(number) or -1)
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.watching() as watch, pytest.raises(interrupts.Stopped):
        signal.raise_signal(signal.SIGTERM)
    assert watch.requested and watch.received == {signal.SIGTERM}
    assert signal.getsignal(signal.SIGTERM) == before
    assert given[0] >= 0 and given[1:] == [-1]  # taken, and given back


def test_a_notebooks_backend_of_matplotlib_is_no_obstacle(tmp_path: Path) -> None:
    process = start(
        *("pretrain", "--train.max_steps", "1", "--train.dir", str(tmp_path / "run")),
        MPLBACKEND="module://no_such_module.backend_inline",
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert (tmp_path / "run" / "curves.png").exists()


def test_torchrun_repeats_our_message(tmp_path: Path) -> None:
    error = tmp_path / "error.json"
    process = start("pretrain", "digit", TORCHELASTIC_ERROR_FILE=str(error))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    message = json.loads(error.read_text())["message"]["message"]
    assert "did you mean 'digits'" in message and message in out


@pytest.mark.parametrize("labelled", [True, False])
def test_the_commands_of_the_next_lines_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labelled: bool
) -> None:
    folder = runs.make_images(tmp_path / "photos of mine", 60)
    if not labelled:
        folder = folder / "class0"
    process = start(
        *("pretrain", "digits", "--data.path", str(folder), "--data.source", "folder"),
        *("--model.arch", "resnet18", "--augment.size", "32", "--data.batch_size", "16"),
        *("--train.max_steps", "1", "--train.dir", str(tmp_path / "a run")),
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    commands = [line.split(": ", 1)[1] for line in out.splitlines() if line.startswith("next: ")]
    commands = [command for command in commands if command.startswith("mocofast")]
    assert len(commands) == (2 if labelled else 1), out
    image = next(folder.rglob("*.jpg"))
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("next: "):  # predict, with the new classifier
                words = shlex.split(line.replace("IMAGE", shlex.quote(str(image))))
                assert cli.main(words[2:]) == 0, line
    assert (tmp_path / "a run" / "backbone.pt").exists()
    assert labelled == ("(measured at step 1)" in out)


def test_help_is_short_and_needs_no_pytorch() -> None:
    script = (
        "import sys\nfrom mocofast import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    for arguments in (["--help"], ["pretrain", "--help"], ["pretrain", "--optim.lrr", "1"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=runs.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if arguments == ["--help"]:
            assert len(done.stdout.splitlines()) <= 30
            assert done.stdout.count("  mocofast pretrain") == 3


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_that_is_closed_from_the_start_is_no_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["mocofast", "--version" if name == "stdout" else "nothing"])
    assert __main__.main() == (0 if name == "stdout" else 2)
    getattr(sys, name).close()
