"""What all commands share: usage, signals, exit statuses, closed output, torchrun's report."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mocofast import completion, interrupts, memory, openmp, settings
from mocofast.errors import (
    ConfigError,
    DivergedError,
    UnreachableError,
    printable,
    torchvision_way_out,
)

# Packages of the extra `train`. The ops do without them.
TRAINING = ("PIL", "matplotlib", "safetensors", "sklearn", "torchvision", "tqdm", "yaml")

Commands = Mapping[str, Callable[[Sequence[str]], int]]

# A full disk, a quota or a largest size of files, a disk that fails or may not be written.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
# Names that no file can have, or that stand for something else.
_WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EEXIST)

EXAMPLES = (
    "mocofast pretrain                         the embedded digits: minutes on two CPU cores",
    "mocofast pretrain PHOTOS                  a folder of images; settings fit folder and machine",
    "mocofast pretrain moco_v2_r50_200ep --data.path PHOTOS --train.epochs 100",
)


def _usage(commands: Commands) -> str:
    lines = "\n".join(f"  {name:12}{command.__doc__}" for name, command in commands.items())
    examples = "\n  ".join(EXAMPLES)
    return (
        f"usage: mocofast COMMAND [...], for example\n  {examples}\n\ncommands:\n{lines}\n"
        "mocofast COMMAND --help shows the options used most, --help-all all of them."
    )


def run(commands: Commands, argv: Sequence[str]) -> int:
    """Runs a command. Returns its exit status.

    commands: {name: function of the words after the name, which returns a status}.
    argv: the words after "mocofast".

    0: done. 2: arguments that cannot be used. 75: a signal ended a run, which continues later.
    74: the system refuses a write (disk full). 77: a rank hung.
    76: a run diverged, and its last finite checkpoint stays.
    128 + the signal's number: a signal ended another command. 141: the reader of the output left.
    """
    if "MPLBACKEND" in os.environ:
        # Notebooks name a backend of their own. No command opens a window.
        os.environ["MPLBACKEND"] = "agg"
    if completion.is_asked():
        return completion.complete(commands)
    argv = list(argv)
    with interrupts.watching():
        try:
            try:
                return _run(commands, argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # as in `mocofast ... | head`
            interrupts.drop_output()
            return 128 + 13  # SIGPIPE
        except KeyboardInterrupt as stop:
            command = argv[0] if argv else ""
            started = command in ("pretrain", "detect", "segment")
            where = ": stopped before the first step" if started else ": stopped"
            if command == "sweep":
                where += "; the same command continues"
            print(f"mocofast {command}{where}", file=sys.stderr)
            number = getattr(stop, "number", interrupts.EXIT_CTRL_C - 128)
            return interrupts.EXIT_INTERRUPTED if started else 128 + number


def _run(commands: Commands, argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(commands))
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        from mocofast import __version__

        print(f"mocofast {__version__}")
        return 0
    if name == "--help-all":
        for command in commands.values():
            with contextlib.suppress(SystemExit):
                command(["--help-all"])
            print()
        return 0
    if name not in commands:
        hint = settings.nearest(name, commands)
        usage = _usage(commands)
        print(f"mocofast: unknown command {name!r}{hint}\n\n{usage}", file=sys.stderr)
        return 2
    # Read when PyTorch loads. Benchmarks of ops measure what a user of the ops gets.
    as_users = name != "bench" or rest[:1] in (["train"], ["step"])
    if as_users:
        openmp.wait_briefly()
        memory.keep_freed()
    try:
        return commands[name](rest)
    except DivergedError as error:
        _report(name, error)
        return interrupts.EXIT_DIVERGED
    except (ConfigError, FileNotFoundError, NotADirectoryError, UnreachableError) as error:
        _report(name, error)
        return 2
    except OSError as error:
        if error.errno not in (*_REFUSALS, *_WRONG_NAMES):
            raise
        _report(name, error)
        return 2 if error.errno in _WRONG_NAMES else interrupts.EXIT_SYSTEM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAINING:
            raise
        missing = f"needs the package {error.name}, which is not installed"
        way_out = "pip install 'mocofast[train]' installs all packages of the commands"
        if error.name == "torchvision":
            way_out = torchvision_way_out()
        print(f"mocofast {name}: {missing}. {way_out}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside the block no garbage is collected: PyTorch's modules then load a tenth faster.

    The objects of the block count as permanent, so later collections skip them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _report(name: str, error: Exception) -> None:
    """Prints an error on rank 0, because every rank meets the same error."""
    message = "\n".join(map(printable, f"mocofast {name}: {error}".split("\n")))
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    _tell_torchrun(message)


def _tell_torchrun(message: str) -> None:
    """Writes the file of a failed rank, from which torchrun ends its own report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")
