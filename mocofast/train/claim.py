"""Claims a run folder: two runs never share a folder."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from mocofast import distributed, files
from mocofast.config import ConfigError
from mocofast.train.checkpoint import has_checkpoint
from mocofast.train.run_folder import FolderOptions, choose_folder

LOCK = ".lock"


def claim_on_rank_0(
    held: contextlib.ExitStack, config: FolderOptions, resuming: bool, rank: int
) -> Path:
    """Returns the run folder on all ranks. `held` keeps the claim, on rank 0.

    All ranks raise ConfigError together if another run holds the folder.
    """
    found: Path | ConfigError | None = None
    if rank == 0:
        try:
            found = held.enter_context(claimed_folder(config, resuming))
        except ConfigError as error:
            found = error
    found = distributed.from_main(found)
    if isinstance(found, ConfigError):
        raise found
    assert found is not None
    return found


@contextlib.contextmanager
def claimed_folder(config: FolderOptions, resuming: bool) -> Iterator[Path]:
    """Yields the run folder of a configuration, locked until the block or the process ends.

    resuming: take the newest existing run of the recipe. Otherwise, without `train.dir`, take a
        name that is free.
    A folder that is still empty at the end is removed.
    Raises ConfigError if another run holds the folder. (The system drops the lock of a process
    that dies, so no lock is ever stale.)
    """
    path, made = choose_folder(config, resuming), []
    while True:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"train.dir: a parent of {path} is a file") from None
        except OSError as error:
            raise _not_made(path, error) from error
        try:
            path.mkdir()
            break
        except FileExistsError:
            if config.train.dir or resuming:
                break
            path = choose_folder(config, resuming)  # another run was faster
        except OSError as error:
            raise _not_made(path, error) from error
    if not path.is_dir():
        raise ConfigError(f"train.dir: {path} is a file")
    held = _lock(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            if made and [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
                for folder in made:  # up to a folder that another run uses
                    folder.rmdir()
        held.close()


def _not_made(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(
        f"train.dir: {folder} cannot be made ({reason}): choose another folder (--train.dir)"
    )


def check_unused(folder: Path) -> None:
    """Raises ConfigError if a folder holds the checkpoints of a run."""
    if has_checkpoint(folder):
        raise ConfigError(
            f"train.dir: {folder} holds a run already. --resume auto continues this run, "
            "another --train.dir starts a new run"
        )


def _lock(folder: Path) -> contextlib.ExitStack:
    """Locks a folder. Close the result to unlock the folder."""
    held = contextlib.ExitStack()
    path = folder / LOCK
    while True:
        try:
            file = held.enter_context(path.open("a+", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"train.dir: {folder} cannot be written ({error})") from error
        if not files.lock(file, wait=False):
            file.seek(0)
            owner = file.read().strip() or "another process"
            held.close()
            raise ConfigError(
                f"train.dir: {folder} is in use by {owner}; another --train.dir starts a run of "
                "its own"
            )
        # A run that was refused may have removed the file between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        held.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return held
