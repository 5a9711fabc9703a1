"""What a run leaves after a fault: the state at an exception, batches with a wrong loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from mocofast import distributed
from mocofast.errors import NothingDecodedError, describe_error
from mocofast.train.checkpoint import RunState
from mocofast.train.checkpoint_writer import save_atomically

log = logging.getLogger("mocofast")

FOLDER = "nonfinite"


class GoBack(Exception):
    """The run continues from its last checkpoint, and leaves steps out. steps: counted from 1."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__(f"leaves out {steps}")
        self.steps = steps


class Saved(NamedTuple):
    """The steps whose batches are saved, and a sentence for the log."""

    steps: tuple[int, ...]
    text: str


def save_batches(state: RunState, step: int | None, folder: Path) -> Saved:
    """Writes this rank's part of two batches: of a step with a wrong loss, and of the step before.

    The step before is the one whose gradients made the weights wrong, if its loss was finite.
    A batch is a function of seed, epoch and step, so no batch waits in memory for this.

    step: counted from 1. None: the last step.
    folder: the run folder. The files are nonfinite/step_N_rank_R.pt: views (B, C, S, S), index and
        labels (B,), names, as the method saw them.
    """
    step = step or state.step
    steps = tuple(number for number in (step - 1, step) if number > 0)
    named = f"steps {', '.join(map(str, steps))}"
    place, (rank, _) = folder / FOLDER, distributed.rank_and_world_size()
    try:
        place.mkdir(exist_ok=True)
        for number in steps:
            batch = next(state.pace.epoch(state.loader, *state.pace.place(number - 1)))
            content = {
                "step": number,
                "views": [view.cpu() for view in batch.views],
                "index": batch.index,
                "labels": batch.labels,
                "names": [state.source.name(int(index)) for index in batch.index],
            }
            save_atomically(content, place / f"step_{number:08d}_rank_{rank}.pt")
    except OSError as error:
        return Saved(steps, f"The batches of {named} cannot be written ({error.strerror or error})")
    return Saved(steps, f"The batches of {named} are in {place}")


def save_state(state: RunState, error: Exception, folder: Path) -> None:
    """Writes the state at an exception. No resume takes the file unasked. Never raises.

    Without effect after an error of the data, whose message says all, and after an error of the
    system or of a collective: another rank has ended then.
    A sharded run leaves no state: its parts are on all ranks, and one rank may have failed alone.
    folder: the run folder. The file is exception.pt.
    """
    of_ranks = isinstance(error, (OSError, torch.distributed.DistError)) or "gloo" in str(error)
    if of_ranks or isinstance(error, NothingDecodedError) or state.sharding is not None:
        return
    path = folder / "exception.pt"
    try:
        content = state.collect(alone=True)
        assert content is not None  # on rank 0
        save_atomically(content, path)
    except Exception as another:  # a device that is lost gives no tensors
        log.warning("the state cannot be saved: %s", describe_error(another))
        return
    log.error(
        "%s after step %d. The last checkpoint stays. The state at the exception, perhaps in the "
        "middle of a step, is %s",
        describe_error(error),
        state.step,
        path,
    )
