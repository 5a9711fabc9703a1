"""Notices a run whose loss or weights are not finite, and says how to go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mocofast import distributed
from mocofast.errors import DivergedError
from mocofast.train.checkpoint import step_files
from mocofast.train.finite import are_finite
from mocofast.train.metrics import LOSS


def check_loss(
    values: Mapping[str, float], steps: str, rate: float, step: int | None = None
) -> None:
    """Raises DivergedError if the loss of a log line, which all ranks share, is not finite.

    values: means of the metrics. steps: the steps of the means, in words. rate: the learning rate
        at the last step. step: the first step whose loss is not finite, if it is known.
    """
    if not math.isfinite(values[LOSS]):
        raise DivergedError(
            f"the run diverged: the loss is {values[LOSS]} in {steps}, at learning rate {rate:.4g}",
            step,
        )


def check_weights(tensors: Iterable[Tensor], step: int, rate: float) -> None:
    """Raises DivergedError on all ranks if a floating tensor of any rank is not finite.

    Waits for the device. A collective call.
    tensors: parameters and buffers. Further arguments: as for `check_loss`.
    """
    if not all(distributed.gather_objects(are_finite(tensors))):
        raise DivergedError(
            f"the run diverged: weights are not finite after step {step}, "
            f"at learning rate {rate:.4g}"
        )


def way_out(folder: Path) -> str:
    """Names the last checkpoint of a run folder, whose weights are finite, and what to change."""
    kept = step_files(folder / "checkpoints", "*.pt")
    checkpoint = "There is no checkpoint yet"
    if kept:
        checkpoint = f"The last finite checkpoint is kept: {kept[0]}"
    return (
        f"{checkpoint}. Start a new run with a lower --optim.lr, or with a warm-up "
        "(--optim.warmup_epochs)"
    )
