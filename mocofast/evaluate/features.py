"""Features of a whole set of images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocofast.models import encoders, pixels


def extract(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None, Tensor]],
    device: torch.device,
    kind: str,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) int64, both on the CPU, of every image that `batches` yields.

    encoder: on `device`; runs in eval mode without gradients, and every submodule gets its own mode back.
    batches: (images, labels, index) as `eval_batches` yields them, images (B, 3, S, S) uint8.
    kind: "backbone" for pooled features before the head, "output" for the embedding after it; neither is
    L2-normalised. mean, std: (3,) of pixels on the 0..255 scale (`pixel_statistics`).
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
    """Features (B, D) float32 of one batch of images (B, 3, S, S) uint8; everything on one device."""
    images = pixels.prepare_images(images, mean, std)
    out = encoders.features(encoder, images) if kind == "backbone" else encoder(images)
    return out.float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has the mode it had (parts may be frozen in eval mode)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
