"""What a classifier predicts: a class, several tags, or a number."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mocofast.config import ConfigError

NO_TAG = "-"  # the text of a label without any tag
_SEPARATORS = re.compile(r"\s*[;|,]\s*")


class Targets(NamedTuple):
    """What the labels of a set mean. L: distinct labels, T: outputs of a classifier.

    kind: class, tags or number, as `data.target`.
    names: of the outputs: the classes, the tags, or ("value",).
    table: (L, T) float32: the target of every label. Of classes the identity.
    """

    kind: str
    names: tuple[str, ...]
    table: Tensor

    def of(self, labels: Tensor) -> Tensor:
        """Returns the targets (N, T) float32 of labels (N,) int64, on the device of the labels."""
        return self.table.to(labels.device)[labels]


def targets_of(classes: tuple[str, ...], kind: str) -> Targets:
    """Returns the targets of labels.

    classes: the texts of the labels. Of tags, a text is several tags between ; | or commas, or "-"
        for none.
    kind: class, tags or number.
    Raises ConfigError for texts that are no numbers, and for fewer than two tags.
    """
    if kind == "class":
        return Targets(kind, classes, torch.eye(len(classes)))
    if kind == "number":
        values = []
        for text in classes:
            try:
                values.append(float(text))
            except ValueError:
                values.append(float("nan"))
            if not np.isfinite(values[-1]):
                raise ConfigError(
                    f"data.target: number needs labels that are numbers, got {text!r}"
                )
        return Targets(kind, ("value",), torch.tensor(values)[:, None])
    sets = [
        {tag for tag in _SEPARATORS.split(text.strip()) if tag not in ("", NO_TAG)}
        for text in classes
    ]
    names = tuple(sorted(set().union(*sets)))
    if len(names) < 2:
        raise ConfigError(
            f"data.target: tags needs two tags or more, between ; | or commas, got {names}"
        )
    table = torch.tensor([[float(name in tags) for name in names] for tags in sets])
    return Targets(kind, names, table)


def loss_of(kind: str, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean loss over a batch, () float32.

    outputs: (B, T) float32: logits, or of numbers, values. targets: (B, T) float32.
    Cross-entropy for classes, binary cross-entropy (mean over tags), and squared error.
    """
    if kind == "class":
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
    if kind == "tags":
        smooth = targets * (1 - label_smoothing) + 0.5 * label_smoothing
        return F.binary_cross_entropy_with_logits(outputs, smooth)
    return F.mse_loss(outputs, targets)
