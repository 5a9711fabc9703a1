"""How ranks share the images of a batch, also where their number does not divide the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mocofast.errors import ConfigError


@dataclass(frozen=True)
class Shares:
    """The images of every rank in a batch, or in a micro-batch of an optimiser step.

    counts: number of images of every rank, at least 1.
    parts: number of parts of every rank, where BatchNorm takes its statistics over G parts of the
        whole batch. Image i is in part i % G. (): ranks have consecutive images.
    """

    counts: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Images of all ranks."""
        return sum(self.counts)

    @property
    def equal(self) -> bool:
        """Whether all ranks have equally many images."""
        return len(set(self.counts)) == 1

    def weight(self, rank: int) -> float:
        """Returns the factor with which the mean over ranks becomes the mean over images."""
        return 1.0 if self.equal else self.counts[rank] * len(self.counts) / self.total

    def start(self, rank: int) -> int:
        """Returns the number of images of the ranks before."""
        return sum(self.counts[:rank])

    def rows(self, rank: int) -> np.ndarray:
        """Returns the numbers of a rank's images in the batch, (n,) int64, ascending."""
        if not self.parts:
            start = self.start(rank)
            return np.arange(start, start + self.counts[rank])
        first, every = sum(self.parts[:rank]), sum(self.parts)
        table = np.arange(self.total).reshape(-1, every)
        return table[:, first : first + self.parts[rank]].ravel()

    def places(self) -> np.ndarray | None:
        """Returns where the images of the batch are in the images of all ranks, joined, (T,) int64.

        None: in the order of the batch.
        """
        if not self.parts or len(self.counts) == 1:
            return None
        return np.argsort(np.concatenate([self.rows(rank) for rank in range(len(self.counts))]))

    def micro_batches(self, number: int) -> list[Shares]:
        """Returns the shares of `number` micro-batches, in the order in which a rank has them.

        There are fewer than `number` where a rank has fewer images, or a part.
        """
        if self.parts:
            rounds = _divided(self.total // sum(self.parts), number)
            return [Shares(tuple(n * each for n in self.parts), self.parts) for each in rounds]
        number = min(number, *self.counts)
        return [Shares(each) for each in zip(*(_divided(n, number) for n in self.counts))]


def _divided(count: int, number: int) -> list[int]:
    """Returns `number` parts of `count`, or `count` parts of 1, the larger ones first."""
    number = min(number, count)
    return [count // number + (i < count % number) for i in range(number)]


def share(total: int, world_size: int, parts: int = 1) -> Shares:
    """Divides `total` images over ranks, as equally as possible.

    parts: parts of the batch over which BatchNorm takes statistics (model.bn_splits). With more
        than one part, a rank has whole parts.
    Raises ConfigError if the images cannot be divided.
    """
    if parts == 1:
        if total < world_size:
            raise ConfigError(
                f"data.batch_size: expected an image for every rank, got {total} images and "
                f"{world_size} ranks"
            )
        return Shares(tuple(_divided(total, world_size)))
    if total % parts:
        raise ConfigError(
            f"model.bn_splits: the {total} images of a batch cannot be divided into {parts} parts "
            "(data.batch_size)"
        )
    of_ranks = parts_of_ranks(parts, world_size)
    return Shares(tuple(n * (total // parts) for n in of_ranks), of_ranks)


def parts_of_ranks(parts: int, world_size: int) -> tuple[int, ...]:
    """Returns the number of parts of every rank. Raises ConfigError for more ranks than parts."""
    if parts < world_size:
        raise ConfigError(
            f"model.bn_splits: expected 1, or a part of the batch for every rank: got {parts} "
            f"parts and {world_size} ranks"
        )
    return tuple(_divided(parts, world_size))
