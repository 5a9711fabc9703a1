"""Writes the checkpoints of sharded runs: every rank its parts, rank 0 the file that names them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mocofast.train import parts
from mocofast.train.checkpoint_writer import CheckpointWriter


class ShardedCheckpointWriter(CheckpointWriter):
    """As CheckpointWriter, on all ranks together. Every rank calls every method.

    folder: in storage that all ranks share.

    First all ranks write a new folder, step_NNNNNNNN.parts. Then rank 0 writes the file, which
    names the folder. A process that is killed before leaves a folder that no file names, and the
    next write removes the folder.
    The threads of the ranks talk in a process group of their own.
    """

    def __init__(self, folder: Path, keep: int, make_room: bool = False) -> None:
        super().__init__(folder, keep, make_room)
        self._group = dist.new_group(backend="gloo")
        self._rank = dist.get_rank()

    def _write_files(self, state: dict[str, Any]) -> None:
        content, tensors = parts.split(state)
        place = self.folder / self._from_main(lambda: self._free_name(state["step"]))
        try:
            files = parts.write(tensors, place, self._group)
            content["parts"] = {"folder": place.name, "files": files}
            self._from_main(lambda: CheckpointWriter._write_files(self, content))
        except OSError:
            if self._rank == 0:  # the disk is full
                shutil.rmtree(place, ignore_errors=True)
            raise

    def _free_name(self, step: int) -> str:
        """Returns a folder's name that no checkpoint has. (A run may go back, and come again.)"""
        named = {parts.folder_of(file) for file in self.folder.glob("*.pt")}
        name = first = f"step_{step:08d}{parts.SUFFIX}"
        number = 1
        while name in named:
            number += 1
            name = f"{first}-{number}"
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a killed process
        return name

    def _made_room(self) -> bool:
        return bool(self._from_main(super()._made_room))

    def _ends(self, is_last: bool) -> bool:
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, is_last, group=self._group)
        return all(answers)

    def _from_main(self, call: Callable[[], Any]) -> Any:
        """Returns on every rank what `call` returns on rank 0. Raises its OSError on every rank."""
        box: list[Any] = [None, None]
        if self._rank == 0:
            try:
                box[0] = call()
            except OSError as error:
                box[1] = OSError(error.errno, error.strerror, str(self.folder))
        dist.broadcast_object_list(box, 0, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]
