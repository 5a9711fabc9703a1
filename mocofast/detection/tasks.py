"""The two tasks: losses of a step, evaluation of a model, pictures of its predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast import distributed
from mocofast.config import ConfigError
from mocofast.data.loaders import count_workers
from mocofast.detection.average_precision import (
    Detections,
    coco_ap,
    encode,
    require_pycocotools,
    voc07_ap,
)
from mocofast.detection.backbones import interpolated
from mocofast.detection.batches import (
    Reader,
    at_val_size,
    detection_sample,
    prefetched,
    segmentation_sample,
)
from mocofast.detection.layouts import Sets
from mocofast.detection.models import Segmenter, detector
from mocofast.detection.options import DetectConfig, SegmentConfig, TaskConfig
from mocofast.detection.sets import IGNORED, Target
from mocofast.detection.start import Start
from mocofast.evaluate.features import EvaluationStopped, evaluating


class Prediction(NamedTuple):
    """A prediction beside the truth, for a picture.

    image: (C, H, W) float32, 0 to 1. truth, found: objects (detection), or classes (H, W).
    """

    image: Tensor
    truth: Any
    found: Any


class DetectionTask:
    """Boxes, or boxes and masks."""

    def __init__(self, config: DetectConfig) -> None:
        require_pycocotools()
        self.config = config
        self.with_masks = config.model.name.startswith("mask_")
        self.kind = "masks" if self.with_masks else "boxes"

    def build(self, start: Start, sets: Sets) -> nn.Module:
        """Returns the untrained detector."""
        shown = [item for item in sets.train.items if item.target.trained.any()]
        if shown:  # the files of masks are read later
            sets.train.items[:] = shown
        elif not self.with_masks:
            raise ConfigError("data.train: no image of the training set has an object")
        return detector(self.config, start, len(sets.train.classes))

    def sample(self, image: Tensor, target: Target, generator: torch.Generator) -> Any:
        """Returns a sample of training."""
        return detection_sample(image, target, generator, self.config.data.flip)

    def losses(self, model: nn.Module, batch: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Returns the parts of the loss of a batch, {name: ()}."""
        images = [image.to(device) for image, _ in batch]
        targets = [{name: x.to(device) for name, x in target.items()} for _, target in batch]
        parts: dict[str, Tensor] = model(images, targets)
        return parts

    def predict(self, model: nn.Module, image: Tensor, device: torch.device) -> Detections:
        """Returns what the model finds in an image (C, H, W)."""
        transform: Any = model.transform
        sizes = transform.min_size
        transform.min_size = (self.config.data.val_size,)
        try:
            (found,) = model([image.to(device)])
        finally:
            transform.min_size = sizes
        boxes, scores, labels = (found[n].cpu().numpy() for n in ("boxes", "scores", "labels"))
        masks = None
        if self.with_masks:
            masks = [encode(mask[0].cpu().numpy() > 0.5) for mask in found["masks"]]
        return Detections(boxes, scores, labels, masks)

    def score(self, classes: tuple[str, ...], pairs: list[tuple[Any, Any]]) -> dict[str, float]:
        """Returns the figures of all images. pairs: (target, detections) of every image."""
        targets, found = [t for t, _ in pairs], [d for _, d in pairs]
        values = coco_ap(classes, targets, found)
        if self.with_masks:
            values |= coco_ap(classes, targets, found, masks=True)
        return values | voc07_ap(classes, targets, found)

    def pair(self, truth: Target, found: Any, classes: int) -> tuple[Any, Any]:
        """Returns what `score` needs of an image."""
        if truth.masks is not None:  # bits, instead of a byte a pixel
            truth = truth._replace(masks=[encode(mask) for mask in truth.masks])
        return truth, found


class SegmentationTask:
    """A class for every pixel."""

    kind = "pixels"

    def __init__(self, config: SegmentConfig) -> None:
        self.config = config

    def build(self, start: Start, sets: Sets) -> nn.Module:
        """Returns the untrained network."""
        if len(sets.train.classes) >= IGNORED:
            raise ConfigError(f"data.classes: at most {IGNORED - 1}, got {len(sets.train.classes)}")
        return Segmenter(self.config, start, len(sets.train.classes))

    def sample(self, image: Tensor, pixels: np.ndarray, generator: torch.Generator) -> Any:
        """Returns a sample of training."""
        return segmentation_sample(image, pixels, generator, self.config.data)

    def losses(self, model: nn.Module, batch: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Returns the loss of a batch, {name: ()}: mean cross-entropy of the counted pixels."""
        images = torch.stack([image for image, _ in batch]).to(device)
        labels = torch.stack([labels for _, labels in batch]).to(device).long()
        logits = model(images)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return {"cross_entropy": total / (labels != IGNORED).sum().clamp(min=1)}

    def predict(self, model: nn.Module, image: Tensor, device: torch.device) -> np.ndarray:
        """Returns the class of every pixel (H, W) uint8 of an image (C, H, W)."""
        height, width = image.shape[1:]
        small, _ = at_val_size(image, torch.zeros(height, width), self.config.data.val_size)
        logits = interpolated(model(small[None].to(device)), (height, width))
        found: np.ndarray = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
        return found

    def pair(self, truth: np.ndarray, found: Any, classes: int) -> tuple[Any, Any]:
        """Returns the confusion matrix of an image, and nothing else."""
        return confusion(truth, found, classes + 1), None

    def score(self, classes: tuple[str, ...], pairs: list[tuple[Any, Any]]) -> dict[str, float]:
        """Returns the figures of all images. pairs: (confusion matrix, None) of every image."""
        total = np.sum([matrix for matrix, _ in pairs], axis=0)
        return iou_figures(total, ("background", *classes))


Task = DetectionTask | SegmentationTask


def task_of(config: TaskConfig) -> Task:
    """Returns the task of a configuration."""
    if isinstance(config, DetectConfig):
        return DetectionTask(config)
    return SegmentationTask(config)


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Returns (classes, classes) int64: pixels of class i, found to be of class j."""
    from sklearn.metrics import confusion_matrix

    counts = truth != IGNORED
    if not counts.any():
        return np.zeros((classes, classes), np.int64)
    matrix: np.ndarray = confusion_matrix(truth[counts], found[counts], labels=np.arange(classes))
    return matrix


def iou_figures(matrix: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Returns miou, pixel_accuracy and iou_CLASS, 0 to 1. matrix: of `confusion`.

    As VOC does, the mean is over background and classes. A class neither shown nor found
    does not count.
    """
    from sklearn.metrics import accuracy_score, jaccard_score

    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    if not len(shown):
        return {"miou": 0.0, "pixel_accuracy": 0.0}
    truth, found = np.indices(matrix.shape).reshape(2, -1)
    pixels = {"sample_weight": matrix.ravel()}  # of every cell: a sample for each
    iou = jaccard_score(truth, found, labels=shown, average=None, **pixels)
    return {
        "miou": float(iou.mean()),
        "pixel_accuracy": float(accuracy_score(truth, found, **pixels)),
        **{f"iou_{names[number]}": float(value) for number, value in zip(shown, iou)},
    }


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    reader: Reader,
    workers: int,
    device: torch.device,
    stopped: Callable[[], bool],
) -> dict[str, float]:
    """Returns the figures of a model on all images of `reader`. All ranks call it together.

    stopped: asked after every image. Raises EvaluationStopped on all ranks if a rank stops.
    An unreadable image is left out, and named in `reader.skipped`.
    """
    rank, world_size = distributed.rank_and_world_size()
    classes = reader.images.classes
    own = [[index] for index in range(rank, len(reader.images), world_size)]
    pairs, is_whole = {}, True
    with evaluating(model):
        for (read,), (index,) in zip(prefetched(reader.read, own, count_workers(workers)), own):
            if read is not None:
                image, truth = read
                pairs[index] = task.pair(truth, task.predict(model, image, device), len(classes))
            if stopped():
                is_whole = False
                break
    gathered = distributed.gather_objects((pairs, is_whole))
    if not all(whole for _, whole in gathered):
        raise EvaluationStopped
    # The order of images, whatever the number of ranks: ties of scores are broken by order.
    found = {index: pair for part, _ in gathered for index, pair in part.items()}
    ordered = [found[index] for index in sorted(found)]
    return distributed.from_main(task.score(classes, ordered) if rank == 0 else None)


@torch.no_grad()
def predictions(
    task: Task, model: nn.Module, reader: Reader, count: int, device: torch.device
) -> list[Prediction]:
    """Returns predictions of the first readable images beside their truth, at most `count`."""
    found: list[Prediction] = []
    with evaluating(model):
        for index in range(len(reader.images)):
            if len(found) < count and (read := reader.read(index)) is not None:
                image, truth = read
                found.append(Prediction(image, truth, task.predict(model, image, device)))
    return found
