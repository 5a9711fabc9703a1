"""Classifiers that describe themselves: what evaluations save, and predict reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mocofast import __version__, settings
from mocofast.config import Config, ConfigError
from mocofast.evaluate.knn import knn_votes
from mocofast.evaluate.targets import Targets
from mocofast.interop.reference_checkpoints import load_backbone
from mocofast.models.encoders import configured_encoder, features, untrained
from mocofast.models.heads import CosineHead, head_names, put, replace_head
from mocofast.models.pixels import pixel_statistics, prepare_images
from mocofast.train.checkpoint import MISFITS
from mocofast.train.checkpoint_file import read_file
from mocofast.train.checkpoint_writer import save_atomically
from mocofast.train.finite import check_finite

FORMAT = "mocofast classifier"
FILE = "classifier.pt"
KINDS = ("finetune", "linear", "knn", "zeroshot")  # commands, and folders of a run


class Bank(NamedTuple):
    """Labelled features that vote. features: (N, D) float16, unit length. labels: (N,) int64."""

    features: Tensor
    labels: Tensor
    k: int
    temperature: float


class Classifier(NamedTuple):
    """An encoder with what turns images into predictions.

    kind: of KINDS. knn has a bank, and an encoder without a head.
    config: of the run. Size, channels, range and statistics of the images are used.
    encoder: in eval mode.
    """

    kind: str
    targets: Targets
    config: Config
    encoder: nn.Module
    bank: Bank | None

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Returns scores (B, T) float32 of images (B, C, S, S), uint8 or uint16.

        Probabilities of classes (kNN: shares of the votes) and of tags, or values.
        """
        device = images.device
        mean, std = (statistic.to(device) for statistic in pixel_statistics(self.config.augment))
        pixels = prepare_images(images, mean, std)
        if self.bank is not None:
            found = features(self.encoder, pixels).float()
            bank = [(self.bank.features.to(device), self.bank.labels.to(device))]
            k, temperature = self.bank.k, self.bank.temperature
            return knn_votes(bank, found, k, temperature, self.targets.table).nan_to_num(0).float()
        outputs: Tensor = self.encoder(pixels).float()
        if self.targets.kind == "class":
            return outputs.softmax(1)
        return outputs.sigmoid() if self.targets.kind == "tags" else outputs


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Writes a classifier as a file of torch.save with tensors, texts and numbers alone."""
    bank = classifier.bank
    save_atomically(
        {
            "format": FORMAT,
            "mocofast": __version__,
            "kind": classifier.kind,
            "target": classifier.targets.kind,
            "names": list(classifier.targets.names),
            "table": classifier.targets.table if bank is not None else None,
            "arch": classifier.config.model.arch,
            "size": classifier.config.augment.size,
            "channels": classifier.config.data.channels,
            "mean": list(classifier.config.augment.mean),
            "std": list(classifier.config.augment.std),
            "config": settings.to_dict(classifier.config),
            "encoder": {
                name: value.detach().cpu()
                for name, value in classifier.encoder.state_dict().items()
            },
            "bank": None if bank is None else bank._asdict(),
        },
        path,
    )


def load_classifier(path: Path) -> Classifier:
    """Reads what `save_classifier` wrote. Raises FileNotFoundError or ConfigError."""
    content = read_file(path)
    if not is_classifier(content):
        raise ConfigError(f"{path}: not a classifier of mocofast {', '.join(KINDS)}")
    try:
        config = settings.from_dict(content["config"])
        names = tuple(content["names"])
        bank = None if content["bank"] is None else Bank(**content["bank"])
        table = torch.eye(len(names)) if content["table"] is None else content["table"]
        encoder = _plain(config)
        weights = content["encoder"]
        for name in head_names(encoder):
            put(encoder, name, _head(name, weights, len(names), bank))
        encoder.load_state_dict(weights)
    except MISFITS as error:  # ConfigError among them
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: not a whole classifier ({first:.300})") from error
    check_finite(weights, str(path))
    targets = Targets(content["target"], names, table)
    return Classifier(content["kind"], targets, config, encoder.eval(), bank)


def _head(name: str, weights: Mapping[str, Tensor], classes: int, bank: Bank | None) -> nn.Module:
    """Returns the head of a classifier, with the shapes of its weights."""
    if bank is not None:
        return nn.Identity()
    if (projection := weights.get(f"{name}.projection.weight")) is not None:
        dim, width = projection.shape
        return CosineHead(width, dim, classes)
    return nn.Linear(weights[f"{name}.weight"].shape[1], classes)


def is_classifier(content: Any) -> bool:
    """Returns whether the content of a file is a classifier."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def find_classifier(path: str) -> Path | None:
    """Returns the classifier of a path, the newest of a run folder, or None.

    path: a classifier's file or folder, a run folder, or a checkpoint (None).
    """
    given = Path(path)
    if given.is_file():
        return given if given.name == FILE else None
    found: Iterable[Path] = [given / FILE, *(given / kind / FILE for kind in KINDS)]
    found = [file for file in found if file.is_file()]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def plain_encoder(encoder: nn.Module, config: Config) -> nn.Module:
    """Returns an encoder of plain layers with the weights of a method's encoder, without its head.

    (Methods may have BatchNorm over splits of the batch.) On the CPU.
    """
    plain = _plain(config)
    load_backbone(plain, encoder.state_dict(), config.model.arch)
    replace_head(plain, nn.Identity())
    return plain


def _plain(config: Config) -> nn.Module:
    return configured_encoder(untrained(config))(num_classes=1)
