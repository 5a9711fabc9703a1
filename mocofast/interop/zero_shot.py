"""Zero-shot classifiers: an image encoder, and the texts of class names (arXiv:2103.00020, 3.1)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mocofast.config import Config, ConfigError
from mocofast.data.interface import Source
from mocofast.device import run_autocast
from mocofast.evaluate.features import (
    evaluating,
    extract,
    extraction,
    image_batches,
    name_left_out,
)
from mocofast.evaluate.ranks import over_ranks
from mocofast.evaluate.targets import targets_of
from mocofast.interop.classifiers import Classifier, plain_encoder
from mocofast.methods.base import Method
from mocofast.methods.clip import CLIP
from mocofast.models.heads import CosineHead, replace_head

TEMPLATES = ("a photo of a {}.",)  # the paper's


def with_texts(model: Method, method: str) -> CLIP:
    """Returns the model of a checkpoint. Raises ConfigError for one without a text encoder.

    method: the name of its method.
    """
    if not isinstance(model, CLIP):
        raise ConfigError(
            f"checkpoint: expected model.method clip, which reads texts, got {method}"
        )
    return model


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates of texts. given: templates, or a .txt file with one in every line.

    Raises FileNotFoundError, or ConfigError for a template without {}.
    """
    templates = list(given)
    if len(templates) == 1 and templates[0].lower().endswith(".txt"):
        lines = _text_of(templates[0], "--templates").splitlines()
        templates = [line.strip() for line in lines if line.strip()]
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"--templates: expected {{}} where the name stands, got {template!r}")
    return tuple(templates)


def read_names(file: str, classes: Sequence[str]) -> dict[str, str]:
    """Returns the names of classes for texts, {class: name}. Without a file, _ becomes a space.

    file: a CSV file with rows CLASS,NAME, or "". Raises FileNotFoundError, or ConfigError for a
        class without a row.
    """
    if not file:
        return {name: name.replace("_", " ") for name in classes}
    rows = [row for row in csv.reader(_text_of(file, "--names").splitlines()) if len(row) > 1]
    names = {row[0].strip(): row[1].strip() for row in rows}
    missing = [name for name in classes if name not in names]
    if missing:
        raise ConfigError(
            f"--names: {file!r} lacks {len(missing)} classes, {missing[0]} for example; expected "
            "rows CLASS,NAME"
        )
    return names


def _text_of(file: str, option: str) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {str(path)!r}")
    return path.read_text(encoding="utf-8", errors="replace")


@torch.no_grad()
def text_weights(model: CLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Returns a unit embedding (T, C) float32 of every class: of the mean over templates.

    model: on the CPU.
    """
    rows = []
    with evaluating(model):
        for name in names:
            texts = [template.replace("{}", name) for template in templates]
            mean = model.encode_texts("text_q", model.tokenize(texts)).mean(0)
            rows.append(F.normalize(mean, dim=0))
    return torch.stack(rows)


def zero_shot_classifier(
    model: CLIP,
    config: Config,
    classes: tuple[str, ...],
    names: Mapping[str, str],
    templates: Sequence[str],
) -> Classifier:
    """Returns the classifier of some classes, on the CPU.

    model: on the CPU. names: {class: its name in texts}.
    """
    weights = text_weights(model, [names[name] for name in classes], templates)
    projection = model.image_projection()
    head = CosineHead(projection.in_features, projection.out_features, len(classes))
    with torch.no_grad():
        head.projection.weight.copy_(projection.weight)
        head.classes.weight.copy_(model.eval().scale() * weights)
    plain = plain_encoder(model.encoder_q, config)
    replace_head(plain, head)
    return Classifier("zeroshot", targets_of(classes, "class"), config, plain.eval(), None)


def classify(classifier: Classifier, source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns scores (N, T) float32 and labels (N,) int64 of labelled images. Call on every rank.

    classifier: its encoder on `device`.
    """
    config = classifier.config
    how = extraction(config, device, run_autocast(config, classifier.encoder, device))

    def compute(part: Source) -> tuple[Tensor, ...]:
        batches = image_batches(part, config, device)
        outputs, labels = extract(classifier.encoder, batches, device, "output", **how)
        name_left_out(part, batches.skipped)
        return outputs.softmax(1), labels

    scores, labels = over_ranks(compute, source)
    return scores, labels
