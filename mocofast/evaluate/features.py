"""Features of all images of a source, from a frozen encoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import Source
from mocofast.data.loaders import count_workers, eval_batches
from mocofast.data.threads import Threads
from mocofast.errors import NothingDecodedError, printable
from mocofast.models import encoders, pixels
from mocofast.models.convolutions import compiled_convolutions
from mocofast.view_sizes import Size

log = logging.getLogger("mocofast")

EVALUATION_BATCH = 256  # images
MOST_NAMED = 20  # images that cannot be decoded
MOST_AT_ONCE = 4  # batches that a CPU computes at the same time: each holds its activations


class EvaluationStopped(Exception):
    """A signal ended an evaluation early."""


class EvaluationTooLongError(Exception):
    """An evaluation ended early, because it would take longer than is allowed."""

    def __init__(self, seconds: float) -> None:
        """seconds: of the whole evaluation, predicted."""
        super().__init__(seconds)  # pickles
        self.seconds = seconds

    def __str__(self) -> str:
        return f"it would take about {self.seconds:.0f} s"


def image_batches(
    source: Source, config: Config, device: torch.device, size: Size = 0
) -> EvalBatches:
    """Returns all images of `source` once: (images, labels, index) in batches of EVALUATION_BATCH.

    config: gives the size of the centre crop, the channels and the number of workers.
    device: of the images.
    size: of the centre crop. 0: that of the views of training.
    """
    data, size = config.data, size or config.augment.size
    return eval_batches(source, size, EVALUATION_BATCH, data.workers, device, data.channels)


def batches_at_once(workers: int, device: torch.device) -> int:
    """Returns how many batches `extract` computes at the same time: enough for all free cores.

    workers: value of `data.workers`.

    PyTorch computes a batch on the threads of `torch.get_num_threads`, which leave cores for the
    loader in training. Another batch on the other cores gives equal bits, and no thread waits for
    a thread of the other batch.
    """
    if device.type != "cpu":
        return 1
    free = min(count_workers(workers), count_workers(-1) // torch.get_num_threads())
    return max(1, min(free, MOST_AT_ONCE))


def extraction(
    config: Config, device: torch.device, autocast: torch.autocast | None
) -> dict[str, Any]:
    """Returns the arguments of `extract_batches` that follow from the configuration of a run.

    They are mean, std, autocast (as given) and at_once.
    """
    mean, std = pixels.pixel_statistics(config.augment)
    at_once = batches_at_once(config.data.workers, device)
    return {"mean": mean, "std": std, "autocast": autocast, "at_once": at_once}


def extract(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    device: torch.device,
    kind: str,
    mean: Tensor,
    std: Tensor,
    autocast: torch.autocast | None = None,
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """Returns features (N, D) float32 and labels (N,) int64 of all images, on the CPU.

    Arguments: as for `extract_batches`.
    Raises ValueError for an unknown kind or a batch without labels, and ConfigError for no batches:
    no image can be decoded.
    """
    features, every = [], []
    statistics = (mean, std)
    for found, labels, _ in extract_batches(
        encoder, batches, device, kind, *statistics, autocast=autocast, at_once=at_once
    ):
        if labels is None:
            raise ValueError("batches must carry labels: the images have none")
        features.append(found)
        every.append(labels)
    if not features:
        skipped = getattr(batches, "skipped", {})
        first = f"; the first: {next(iter(skipped.values()))}" if skipped else ""
        raise NothingDecodedError(
            f"data.path: none of the images to evaluate can be decoded{first}"
        )
    return torch.cat(features), torch.cat(every)


def extract_batches(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    device: torch.device,
    kind: str,
    mean: Tensor,
    std: Tensor,
    autocast: torch.autocast | None = None,
    at_once: int = 1,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yields features (B, D) float32, labels (B,) int64 or None, and index (B,), on the CPU.

    encoder: on `device`. Runs in eval mode without gradients. Its submodules get their modes back.
    batches: (images, labels, index), as `image_batches` yields, images (B, C, S, S), uint8 or
        uint16.
    kind: "backbone" (pooled features before the head) or "output" (embedding after the head).
        Features are not L2-normalised.
    mean, std: (C,) or (1,), of pixels on the 0..255 scale, see `pixel_statistics`.
    autocast: of the forward passes. None: no autocast.
    at_once: batches that are computed at the same time, each on as many threads as one batch alone.
    Raises ValueError for an unknown kind.
    """
    if kind not in ("backbone", "output"):
        raise ValueError(f"kind must be 'backbone' or 'output': got {kind!r}")
    mean, std = mean.to(device), std.to(device)
    if autocast is None:
        autocast = torch.autocast(device.type, enabled=False)
    threads = torch.get_num_threads()
    free: SimpleQueue[nn.Module] = SimpleQueue()  # encoders that compute no batch

    def compute(
        batch: tuple[Tensor, Tensor | None, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        images, labels, index = batch
        encoder = free.get()
        try:
            with torch.no_grad(), copy.copy(autocast):
                found = embed(encoder, images.to(device, non_blocking=True), mean, std, kind)
            return found.cpu(), None if labels is None else labels.cpu(), index
        finally:
            free.put(encoder)

    def compute_in_thread(
        batch: tuple[Tensor, Tensor | None, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        torch.set_num_threads(threads)  # of this thread, which starts with one
        return compute(batch)

    with evaluating(encoder), compiled_convolutions(encoder):
        free.put(encoder)
        if at_once == 1:
            yield from map(compute, batches)
            return
        for _ in range(at_once - 1):
            free.put(_replica(encoder))
        with Threads(at_once, "mocofast-features") as pool:
            yield from pool.map(compute_in_thread, batches, at_once)


def name_left_out(source: Source, skipped: Mapping[int, str]) -> None:
    """Logs which images cannot be decoded, so that no figure is of fewer images in silence.

    skipped: {index in `source`: reason}, of a loader or of `image_batches`.
    """
    for index, reason in sorted(skipped.items())[:MOST_NAMED]:
        log.warning("left out: %s: %s", printable(source.name(index)), printable(reason))
    if len(skipped) > MOST_NAMED:
        log.warning("left out: %d images more that cannot be decoded", len(skipped) - MOST_NAMED)


def check_finite(features: Tensor) -> None:
    """Raises ConfigError if a row of features (N, D) holds NaN or infinity: no accuracy then."""
    finite = features.isfinite().all(1)
    if not finite.all():
        raise ConfigError(
            f"checkpoint: the encoder gives NaN or infinity for {int((~finite).sum())} of "
            f"{len(features)} images, so there is no accuracy of its features"
        )


def _replica(module: nn.Module) -> nn.Module:
    """Copies the modules, and shares their tensors: threads may run copies at the same time.

    (Hooks, as `encoders.features` sets them, belong to one copy.)
    """
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def embed(encoder: nn.Module, images: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """Returns features (B, D) float32 of images (B, C, S, S), uint8 or uint16.

    All inputs are on one device.
    """
    images = pixels.prepare_images(images, mean, std)
    out = encoders.features(encoder, images) if kind == "backbone" else encoder(images)
    return out.float()


@contextmanager
def stoppable(encoder: nn.Module, stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, `encoder` raises EvaluationStopped soon after `stopped` returns True.

    A batch of large images takes minutes on a CPU, so layers ask, not batches. (Hooks leave the
    results as they are. On attention they would select other operators.)
    """

    def check(*_: object) -> None:
        if stopped():
            raise EvaluationStopped

    asking = (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)
    parts = [part for part in encoder.modules() if isinstance(part, asking)]
    handles = [part.register_forward_pre_hook(check) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts `module` in eval mode inside the block. Afterwards restores the mode of every submodule.

    (Frozen submodules may have been in eval mode before.)
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
