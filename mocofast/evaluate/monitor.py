"""The kNN monitor: how good the representation is, without training anything on it."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.data.interface import Source
from mocofast.data.loaders import eval_batches
from mocofast.data.sources import Datasets, Subset
from mocofast.distributed import gather_objects, rank_and_world_size
from mocofast.evaluate.features import extract
from mocofast.evaluate.knn import few_shot_accuracy, knn_accuracy
from mocofast.models.pixels import pixel_statistics


class KNNMonitor:
    """Evaluates an encoder on labelled train and validation images; the ranks share the feature extraction."""

    def __init__(self, train: Source, val: Source, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        if len(train) > config.knn.bank:
            chosen = np.random.default_rng(config.train.seed).permutation(len(train))[
                : config.knn.bank
            ]
            train = Subset(train, np.sort(chosen))
        self.train, self.val = train, val

    @classmethod
    def of(cls, datasets: Datasets, config: Config, device: torch.device) -> KNNMonitor | None:
        """The monitor of these images; None where they have no labels or none are held out."""
        if datasets.val is None or datasets.train.labels is None:
            return None
        return cls(datasets.train, datasets.val, config, device)

    def evaluate(self, encoder: nn.Module) -> dict[str, float]:
        """{"knn_top1": share, ...}, equal on all ranks. BatchNorm uses rank 0's running statistics, as the
        checkpoint that rank 0 writes will."""
        if rank_and_world_size()[1] > 1:
            for buffer in encoder.buffers():
                dist.broadcast(buffer, 0)
        bank, bank_labels = self._features(encoder, self.train)
        queries, query_labels = self._features(encoder, self.val)
        knn = self.config.knn
        result = knn_accuracy(bank, bank_labels, queries, query_labels, knn.k, knn.temperature)
        values = {"knn_top1": result.top1, "knn_top5": result.top5}
        if knn.shots:
            values["few_shot_top1"] = few_shot_accuracy(
                bank, bank_labels, queries, query_labels, knn.shots
            ).mean
        return values

    def _features(self, encoder: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of the whole source, on this rank's device."""
        rank, world_size = rank_and_world_size()
        part = (
            Subset(source, np.arange(rank, len(source), world_size)) if world_size > 1 else source
        )
        augment = self.config.augment
        workers = self.config.data.workers
        batches = eval_batches(part, augment.size, 256, workers, self.device)
        mean, std = pixel_statistics(augment)
        features, labels = extract(
            encoder, batches, self.device, self.config.knn.features, mean, std
        )
        parts = gather_objects((features, labels))
        features, labels = (torch.cat(tensors) for tensors in zip(*parts))
        return features.to(self.device), labels.to(self.device)
