"""Writes checkpoints: atomically, in the background, again where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import IO, Any, cast

import torch

from mocofast import distributed, files
from mocofast.train import parts
from mocofast.train.checkpoint import LAST, step_files

log = logging.getLogger("mocofast")

RETRY = 30.0  # seconds until another try of a write that failed
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Recorder:
    """A file for torch.save, which keeps the error of the system. (torch says "unexpected pos".)"""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Saves by torch.save. `path` has the old content or the new content, never a part.

    Raises OSError if the disk is full, or fails.
    """
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(state, cast(IO[bytes], recorder))
            file.flush()
        except RuntimeError:
            if recorder.error is not None:
                raise recorder.error from None
            raise


def _snapshot(value: Any) -> Any:
    """Returns a copy on the CPU, which later steps cannot change."""
    if isinstance(value, torch.Tensor):
        # clone() keeps strides, so channels-last weights stay channels-last.
        return value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_snapshot(item) for item in value)
    return value


class CheckpointWriter:
    """Writes `folder`/step_NNNNNNNN.pt and last.pt on a thread. Keeps the newest step files.

    keep: number of step files to keep.
    make_room: where the disk is full, remove all step files but the newest, and try again.

    A write that the system refuses (a full disk) is said in the log, and tried again every RETRY
    seconds until a newer checkpoint takes its place. The files before it stay.
    """

    def __init__(self, folder: Path, keep: int, make_room: bool = False) -> None:
        self.folder, self.keep, self.make_room = folder, keep, make_room
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._hurry = threading.Event()  # the present try is the last
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, state: dict[str, Any]) -> None:
        """Copies the state now and writes the copy in the background.

        Raises the error of an earlier write, unless the system refused the write.
        """
        with contextlib.suppress(OSError):  # is said already, and this state is newer
            self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(_snapshot(state),), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits for the write in the background, and for one more try of a write that failed.

        Raises the error of the write.
        """
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._hurry.clear()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any]) -> None:
        failed = 0
        while True:
            is_last = self._hurry.is_set()
            try:
                self._write_files(state)
            except OSError as error:
                failed += 1
                if self.make_room and error.errno in NO_ROOM and self._made_room():
                    continue
                self._error = _in_words(error, state, self.folder)
                if failed == 1 and distributed.is_main():
                    log.warning(
                        "%s. Training goes on; the next try is in %.0f s", self._error, RETRY
                    )
                if self._ends(is_last):
                    return
                self._hurry.wait(RETRY)
                continue
            except BaseException as error:
                self._error = error
                return
            self._error = None
            if failed and distributed.is_main():
                log.info("the checkpoint of step %d is written", state["step"])
            return

    def _write_files(self, state: dict[str, Any]) -> None:
        last = self.folder / LAST
        if not self.keep:
            save_atomically(state, last)
            self._sweep()
            return
        numbered = self.folder / f"step_{state['step']:08d}.pt"
        save_atomically(state, numbered)
        files.regular_target(last)
        link = last.with_name(LAST + ".tmp")
        link.unlink(missing_ok=True)
        try:
            if last.is_symlink():
                raise OSError(errno.EEXIST, "a link, whose target is written")
            os.link(numbered, link)
            os.replace(link, last)
            files.sync_folder(self.folder)
        except OSError:  # also a file system without hard links
            save_atomically(state, last)
        self._prune(self.keep)

    def _made_room(self) -> bool:
        try:
            return bool(self._prune(keep=1))
        except OSError:  # a file that cannot be removed
            return False

    def _ends(self, is_last: bool) -> bool:
        """Returns whether a write that failed is given up."""
        return is_last

    def _prune(self, keep: int) -> int:
        """Removes old step files. Returns how many."""
        old = step_files(self.folder)[keep:]
        for file in old:
            file.unlink(missing_ok=True)
        self._sweep()
        return len(old)

    def _sweep(self) -> None:
        """Removes folders of sharded tensors that no file names."""
        if folders := [f for f in self.folder.glob(f"*{parts.SUFFIX}*") if f.is_dir()]:
            needed = {parts.folder_of(file) for file in self.folder.glob("*.pt")}
            for folder in folders:
                if folder.name not in needed:
                    shutil.rmtree(folder, ignore_errors=True)


def _in_words(error: OSError, state: dict[str, Any], folder: Path) -> OSError:
    """Returns an error of the same kind that names the checkpoint and the room on the disk."""
    room = ""
    if error.errno in NO_ROOM:
        needed = sum(t.nbytes for t in _tensors(state)) / 2**20
        free = shutil.disk_usage(folder).free / 2**20
        room = f" ({free:,.0f} MiB are free, and a checkpoint takes about {needed:,.0f} MiB)"
    text = f"the checkpoint of step {state['step']} cannot be written: {error.strerror or error}"
    return OSError(error.errno, f"{text}{room}", str(folder))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
