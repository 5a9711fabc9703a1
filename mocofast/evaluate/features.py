"""Features of all images of a source, from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocofast.config import Config
from mocofast.data.interface import Source
from mocofast.data.loaders import eval_batches
from mocofast.models import encoders, pixels

EVALUATION_BATCH = 256  # images


def image_batches(
    source: Source, config: Config, device: torch.device
) -> Iterable[tuple[Tensor, Tensor | None, Tensor]]:
    """Returns all images of `source` once: (images, labels, index) in batches of EVALUATION_BATCH.

    config: gives the size of the centre crop, the channels and the number of workers.
    device: of the images.
    """
    data, size = config.data, config.augment.size
    return eval_batches(source, size, EVALUATION_BATCH, data.workers, device, data.channels)


def extract(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    device: torch.device,
    kind: str,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns features (N, D) float32 and labels (N,) int64 of all images, on the CPU.

    encoder: on `device`. Runs in eval mode without gradients. Its submodules get their modes back.
    batches: (images, labels, index), as `image_batches` yields, images (B, C, S, S), uint8 or
        uint16.
    kind: "backbone" (pooled features before the head) or "output" (embedding after the head).
        Features are not L2-normalised.
    mean, std: (C,) or (1,), of pixels on the 0..255 scale, see `pixel_statistics`.
    Raises ValueError for an unknown kind, no batches, or a batch without labels.
    """
    if kind not in ("backbone", "output"):
        raise ValueError(f"kind must be 'backbone' or 'output': got {kind!r}")
    mean, std = mean.to(device), std.to(device)
    features, all_labels = [], []
    with evaluating(encoder), torch.no_grad():
        for images, labels, _ in batches:
            if labels is None:
                raise ValueError("batches must carry labels: the images have none")
            features.append(
                embed(encoder, images.to(device, non_blocking=True), mean, std, kind).cpu()
            )
            all_labels.append(labels.cpu())
    if not features:
        raise ValueError("batches must hold at least one batch: got none")
    return torch.cat(features), torch.cat(all_labels)


def embed(encoder: nn.Module, images: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """Returns features (B, D) float32 of images (B, C, S, S), uint8 or uint16.

    All inputs are on one device.
    """
    images = pixels.prepare_images(images, mean, std)
    out = encoders.features(encoder, images) if kind == "backbone" else encoder(images)
    return out.float()


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
