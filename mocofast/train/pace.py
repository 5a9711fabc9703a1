"""Which batches of the loader a step takes: `data.batch_sizes` joins several from some epoch on.

The loader's batches stay the same, and so do order, views and ranks. A joined step equals a step of
a larger batch (Smith et al. 2018, arXiv:1711.00489).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from mocofast.config import DataConfig
from mocofast.data.interface import Batch, BatchSlice, Loader
from mocofast.shares import Shares
from mocofast.view_sizes import last


class Pace:
    """Steps and batches of a run. Steps and epochs count from 0.

    batches: of an epoch of the loader.
    """

    def __init__(self, data: DataConfig, batches: int) -> None:
        self._data, self._batches = data, batches

    def joined(self, epoch: int) -> int:
        """Returns the number of batches that a step of an epoch joins."""
        size = self._data.batch_size
        return int(last(self._data.batch_sizes, epoch, (size,))[0]) // size

    def steps(self, epoch: int) -> int:
        """Returns the steps of an epoch. The last step may join fewer batches."""
        return -(-self._batches // self.joined(epoch))

    def before(self, epoch: int) -> int:
        """Returns the steps of all epochs before `epoch`."""
        if not self._data.batch_sizes:
            return epoch * self._batches
        return sum(map(self.steps, range(epoch)))

    def place(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step, and the number of the step in the epoch."""
        epoch = 0
        while step >= (steps := self.steps(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def seen(self, epoch: int, step: int) -> int:
        """Returns the batches that the run has taken before a step of an epoch."""
        return epoch * self._batches + min(step * self.joined(epoch), self._batches)

    def of_run(self, epochs: int, max_steps: int) -> tuple[int, int]:
        """Returns the steps of a run and the batches that these take. max_steps: 0 for no limit."""
        steps = self.before(epochs)
        steps = min(max_steps or steps, steps)
        return steps, self.seen(*self.place(steps))

    def shares(self, part: BatchSlice, images: int, epoch: int, step: int) -> Shares:
        """Returns the images of every rank at a step. images: in the training set."""
        first = step * self.joined(epoch)
        numbers = range(first, min(first + self.joined(epoch), self._batches))
        shares = [part.shares(images, number) for number in numbers]
        counts = zip(*(each.counts for each in shares), strict=True)
        return Shares(tuple(map(sum, counts)), shares[0].parts)

    def epoch(self, loader: Loader, epoch: int, start: int) -> Iterator[Batch]:
        """Yields the batches of the steps from `start` on."""
        joined = self.joined(epoch)
        batches = loader.epoch(epoch, start * joined)
        while group := list(islice(batches, joined)):
            yield _join(group)


def _join(batches: list[Batch]) -> Batch:
    """Returns the images of all batches as one batch. A single batch stays as it is."""
    first, *others = batches
    if not others:
        return first
    labels = None
    if first.labels is not None:
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    views = zip(*(batch.views for batch in batches), strict=True)
    index = torch.cat([batch.index for batch in batches])
    return Batch(tuple(torch.cat(same) for same in views), index, labels)
