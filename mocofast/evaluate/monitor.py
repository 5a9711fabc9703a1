"""The kNN monitor: accuracy of nearest neighbours during pretraining."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mocofast.config import Config, ConfigError
from mocofast.data.interface import Source
from mocofast.data.sources import Datasets, Subset, labelled
from mocofast.device import knn_autocast
from mocofast.distributed import gather_objects, rank_and_world_size
from mocofast.evaluate.features import (
    EVALUATION_BATCH,
    EvaluationStopped,
    EvaluationTooLongError,
    batches_at_once,
    check_finite,
    extract,
    extraction,
    image_batches,
    stoppable,
)
from mocofast.evaluate.knn import few_shot_accuracy, knn_accuracy

Images = tuple[Tensor, Tensor | None, Tensor]  # images, labels and index of a batch

CLEARLY = 4  # a prediction without a batch: other precisions and sizes of batches change times

RESNETS = ("resnet", "wide_resnet", "resnext")  # take images of any size


def check_shots(shots: int, bank: Source) -> None:
    """Raises ConfigError for more labels a class than the smallest class of the bank has images."""
    labels = bank.labels
    if labels is None or not (labels >= 0).any():
        return
    counts = np.bincount(labels[labels >= 0])
    smallest = int(np.where(counts > 0, counts, len(bank) + 1).argmin())
    if counts[smallest] < shots:
        raise ConfigError(
            f"knn.shots: expected at most {counts[smallest]}, the images of class "
            f"{bank.classes[smallest]!r} among those that vote (knn.bank), got {shots}"
        )


class KNNMonitor:
    """Evaluates an encoder on labelled train and validation images.

    The bank holds at most `config.knn.bank` train images. At most `config.knn.queries` validation
    images are classified. Both are sampled with the run's seed. Every rank extracts the features
    of its slice of the images.
    """

    def __init__(self, train: Source, val: Source, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        seed, knn, arch = config.train.seed, config.knn, config.model.arch
        if knn.size and not arch.startswith(RESNETS):
            raise ConfigError(
                f"knn.size: expected 0 for model.arch {arch}, which takes images of augment.size; "
                "ResNets take other sizes, too"
            )
        train = at_most(knn.bank, train, np.random.default_rng(seed))
        val = at_most(knn.queries or len(val), val, np.random.default_rng([seed, 1]))
        self.train, self.val = train, val
        if knn.shots:
            check_shots(knn.shots, train)

    @classmethod
    def of(cls, datasets: Datasets, config: Config, device: torch.device) -> KNNMonitor | None:
        """Returns a monitor of `datasets`, or None if `missing` names a reason."""
        if datasets.val is None or cls.missing(datasets, config):
            return None
        return cls(labelled(datasets.train), datasets.val, config, device)

    @staticmethod
    def missing(datasets: Datasets, config: Config) -> str:
        """Returns what a monitor of `datasets` lacks, in words, or "" if it lacks nothing."""
        if datasets.train.labels is None:
            return "no labels"
        if config.data.target != "class":
            return "the labels are no classes"
        return "no images are held out" if datasets.val is None else ""

    def evaluate(
        self,
        encoder: nn.Module,
        stopped: Callable[[], bool] = lambda: False,
        limit: float = math.inf,
        forward: float = 0.0,
    ) -> dict[str, float]:
        """Returns {"knn_top1": share, ...}, equal on all ranks. Shares are from 0 to 1.

        stopped: returns whether to end early. If it does on a rank, all ranks raise
            EvaluationStopped.
        limit: seconds. If a rank predicts a longer evaluation from its first batches, all ranks
            raise EvaluationTooLongError.
        forward: seconds of a forward pass of an image, equal on all ranks, if they are known. Where
            they predict CLEARLY times the limit, nothing is computed.

        Copies rank 0's running statistics of BatchNorm to all ranks first: the checkpoint, which
        rank 0 writes, has the same statistics.
        """
        if rank_and_world_size()[1] > 1:
            for buffer in encoder.buffers():
                dist.broadcast(buffer, 0)
        autocast = knn_autocast(self.config, encoder, self.device)
        images = len(self.train) + len(self.val)
        at_once = batches_at_once(self.config.data.workers, self.device)
        known = forward * images / at_once
        if known > CLEARLY * limit:
            raise EvaluationTooLongError(known)
        forecast = _Forecast(images, limit)
        with stoppable(encoder, stopped):
            bank, bank_labels = self._features(encoder, self.train, autocast, forecast, "bank")
            queries, query_labels = self._features(encoder, self.val, autocast, forecast, "queries")
        knn = self.config.knn
        result = knn_accuracy(bank, bank_labels, queries, query_labels, knn.k, knn.temperature)
        values = {"knn_top1": result.top1, "knn_top5": result.top5}
        if knn.shots:
            values["few_shot_top1"] = few_shot_accuracy(
                bank, bank_labels, queries, query_labels, knn.shots
            ).mean
        return values

    def _features(
        self,
        encoder: nn.Module,
        source: Source,
        autocast: torch.autocast,
        forecast: _Forecast,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        """Returns features (N, D) and labels (N,) of all images, on this rank's device.

        forecast: of all images of the evaluation, on all ranks.
        name: of the progress bar, which rank 0 shows on a terminal.
        """
        rank, world_size = rank_and_world_size()
        if world_size > 1:
            source = Subset(source, np.arange(rank, len(source), world_size))
        batches = tqdm(
            image_batches(source, self.config, self.device, self.config.knn.size),
            desc=f"kNN {name}",
            total=-(-len(source) // EVALUATION_BATCH),
            unit="batch",
            leave=False,
            disable=rank > 0 or not sys.stderr.isatty(),
        )
        how = extraction(self.config, self.device, autocast)
        # What ended a rank early travels in the place of its features.
        extracted: tuple[Tensor, Tensor] | EvaluationStopped | EvaluationTooLongError
        try:
            with batches:
                timed = forecast.of(batches, how["at_once"], world_size)
                extracted = extract(encoder, timed, self.device, self.config.knn.features, **how)
        except (EvaluationStopped, EvaluationTooLongError) as error:
            extracted = error
        of_ranks = gather_objects(extracted)
        for kind in (EvaluationStopped, EvaluationTooLongError):
            for ended in of_ranks:
                if isinstance(ended, kind):
                    raise ended
        features, labels = (torch.cat(tensors) for tensors in zip(*of_ranks))
        check_finite(features)
        return features.to(self.device), labels.to(self.device)


class _Forecast:
    """Ends an evaluation whose first batches predict that it would take too long."""

    def __init__(self, images: int, limit: float) -> None:
        """images: of the whole evaluation. limit: seconds of the whole evaluation."""
        self._images, self._limit = images, limit
        self._began, self._done = time.perf_counter(), 0
        self._first: tuple[float, int] | None = None  # seconds and images of the first batches

    def of(self, batches: Iterable[Images], at_once: int, world_size: int) -> Iterator[Images]:
        """Yields the batches. Raises EvaluationTooLongError between two.

        at_once: batches that are computed at the same time. They count when they are done.
        world_size: ranks that each compute as many images.
        """
        sizes: deque[int] = deque()
        for batch in batches:
            if len(sizes) == at_once:
                self._done += sizes.popleft() * world_size
                self._check()
            sizes.append(len(batch[0]))
            yield batch
        self._done += sum(sizes) * world_size

    def _check(self) -> None:
        passed = time.perf_counter() - self._began
        left = self._images - self._done
        if self._first is None:
            # The first batches start the loader and load kernels, so they tell of the others only
            # where they take long.
            self._first = passed, self._done
            predicted = passed + passed / self._done * left if passed > self._limit / 10 else 0.0
        else:
            seconds, images = self._first
            predicted = passed + (passed - seconds) / (self._done - images) * left
        if predicted > self._limit * (1 + 1 / passed):  # an early prediction must be clear
            raise EvaluationTooLongError(predicted)


def at_most(count: int, source: Source, rng: np.random.Generator) -> Source:
    """Returns `source`, or `count` random samples of a larger source."""
    if len(source) <= count:
        return source
    return Subset(source, np.sort(rng.permutation(len(source))[:count]))
