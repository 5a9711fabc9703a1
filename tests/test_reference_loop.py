"""The reference's loop and the strong baseline train the same method as `mocofast.MoCo`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mocofast_bench.reference_loop import (
    ReferenceLoader,
    ReferenceMoCo,
    StrongMoCo,
    plain_sgd,
    reference_step,
    strong_step,
)
from PIL import Image
from torch import Tensor, nn

from mocofast import MoCo
from mocofast.config import AugmentConfig, OptimConfig
from mocofast.data.sources import ArraySource, FolderSource
from mocofast.device import choose_autocast
from mocofast.models.encoders import TinyResNet
from mocofast.optim.build import build_optimizer
from mocofast.train.step import train_step
from tests.eager_moco import assert_same_to_rounding, random_batches

BATCH, QUEUE = 6, 18  # the reference demands that the queue is a multiple of the batch
STEPS = 7  # the queue wraps around twice, and one step more
BATCHES = random_batches(STEPS, BATCH)
OPTIM = OptimConfig(lr=0.1, weight_decay=1e-3)
FP32 = choose_autocast("fp32", torch.device("cpu"))


def small_moco(splits: int) -> MoCo:
    torch.manual_seed(0)
    return MoCo(TinyResNet, 13, QUEUE, 0.9, 0.1, mlp=True, bn_splits=splits)


def trajectory(
    model: nn.Module, step: Callable[[tuple[Tensor, Tensor]], Tensor | float]
) -> dict[str, Tensor]:
    """Returns the losses of all steps, the final weights and the queue (K, C), in float64."""
    torch.manual_seed(7)  # decides the permutations of the shuffle
    losses = torch.tensor([float(step(pair)) for pair in BATCHES])
    queue = model.queue if model.queue.shape[0] == QUEUE else model.queue.t()
    result = {"losses": losses, "queue": queue, **dict(model.named_parameters())}
    return {name: value.detach().double() for name, value in result.items()}


def reference_trajectory(model: MoCo, dtype: torch.dtype) -> dict[str, Tensor]:
    plain = ReferenceMoCo(model).to(dtype)
    optimizer = plain_sgd(plain.parameters(), OPTIM)
    return trajectory(
        plain, lambda pair: reference_step(plain, tuple(v.to(dtype) for v in pair), optimizer)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [1, 3])  # with 3, wrong permutations give wrong keys
def test_every_loop_follows_the_same_trajectory(splits: int) -> None:
    model = small_moco(splits)
    strong = StrongMoCo(model)
    plain, exact = (reference_trajectory(model, dtype) for dtype in (torch.float32, torch.float64))
    assert exact["losses"][-1] != exact["losses"][0]
    sgd = plain_sgd(strong.parameters(), OPTIM, foreach=True)
    assert_same_to_rounding(
        trajectory(strong, lambda pair: strong_step(strong, pair, sgd, FP32)[0]), plain, exact
    )
    # Our loop comes last: the loops above copy the untrained model.
    optimizer = build_optimizer(model.parameters(), OPTIM)
    ours = trajectory(model, lambda pair: train_step(model, pair, optimizer, 1, FP32).loss)
    assert_same_to_rounding(ours, plain, exact)


def test_the_permutation_matters_to_split_batchnorm() -> None:
    model = small_moco(3)
    exact = reference_trajectory(model, torch.float64)
    unshuffled = ReferenceMoCo(model).double()

    def keep_order(im_k: Tensor) -> tuple[Tensor, Tensor]:
        return im_k, torch.arange(len(im_k))

    unshuffled._shuffle = keep_order  # type: ignore[method-assign]
    optimizer = plain_sgd(unshuffled.parameters(), OPTIM)
    losses = [
        reference_step(unshuffled, tuple(v.double() for v in pair), optimizer) for pair in BATCHES
    ]  # type: ignore[arg-type]
    assert (torch.tensor(losses) - exact["losses"]).abs().max() > 1e-2


def test_accuracy_of_the_strong_baseline_counts_positive_ranks() -> None:
    strong = StrongMoCo(small_moco(1))
    im_q, im_k = BATCHES[0]
    with torch.no_grad():
        twin = copy.deepcopy(strong)
        # Negatives are keys of other images: some negatives score above the positive.
        others = torch.cat([twin.encoder_k(im) for im, _ in BATCHES[1:4]])
        strong.queue.copy_(F.normalize(others))
        q, k = (
            F.normalize(encoder(im))
            for encoder, im in ((twin.encoder_q, im_q), (twin.encoder_k, im_k))
        )
        positive_rank = ((q @ strong.queue.t()) > (q * k).sum(1, keepdim=True)).sum(1)
    shares = [float((positive_rank < top).float().mean()) for top in (1, 5)]
    assert 0 < shares[1] < 1
    metrics = strong_step(strong, (im_q, im_k), plain_sgd(strong.parameters(), OPTIM), FP32)
    assert metrics[1:].tolist() == pytest.approx(shares)


def test_the_reference_refuses_a_batch_that_does_not_divide_its_queue() -> None:
    model = ReferenceMoCo(small_moco(1))
    with pytest.raises(ValueError, match="got 18 keys and batches of 5"):
        model(*(im[:5] for im in BATCHES[0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_normalised_pairs_of_every_image_once(
    tmp_path: Path, workers: int
) -> None:
    for i in range(5):
        Image.fromarray(np.full((9, 7, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    augment = AugmentConfig(size=4, jitter=(0, 0, 0, 0), blur=1.0, std=(0.5, 0.25, 1.0))
    loader = ReferenceLoader(
        FolderSource(tmp_path, [f"{i}.png" for i in range(5)]), augment, 2, workers
    )
    shown = [torch.cat([im_q for im_q, _ in loader.epoch(epoch)]) for epoch in range(3)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.mean, augment.std))
    for images in shown:
        assert images.shape == (4, 3, 4, 4)  # the fifth image does not fill a batch
        # Constant images stay constant through crop, blur, gray (up to rounding) and flip.
        levels = (255 * (images * std + mean)).mean((1, 2, 3)) / 40
        assert len(set(levels.round().int().tolist())) == 4
        assert (levels - levels.round()).abs().max() < 0.05
    assert any(not torch.equal(shown[0], later) for later in shown[1:])
    loader.close()


def test_the_loader_reads_arrays_and_rotates_where_the_recipe_does() -> None:
    images = np.full((2, 8, 8, 3), 200, dtype=np.uint8)
    pairs = ReferenceLoader(
        ArraySource(images, None, ()), AugmentConfig(size=8, rotate=45.0, jitter=(0, 0, 0, 0)), 2, 0
    )
    ((im_q, im_k),) = pairs.epoch(0)
    # A rotated square leaves black corners. The two views are random and differ.
    assert im_q.amin() < -1.5
    assert not torch.equal(im_q, im_k)
