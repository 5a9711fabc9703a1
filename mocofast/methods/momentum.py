"""The momentum encoder that MoCo, MoCo v3 and BYOL share."""

from __future__ import annotations

import copy
from functools import partial

from torch import nn

from mocofast.methods.base import Method
from mocofast.models.vit import without_drop_path
from mocofast.ops import ema_update_
from mocofast.optim.schedule import cosine_momentum


class MomentumMethod(Method):
    """A method whose `encoder_k` is a moving average of `encoder_q`, parameters only."""

    encoder_k: nn.Module

    def make_momentum_encoder(self, momentum: float) -> None:
        """Makes `encoder_k` as a copy of `encoder_q`, which must be complete.

        momentum: m of the average. Raises ValueError unless m is in [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]: got {momentum}")
        self.momentum = momentum
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        without_drop_path(self.encoder_k)

    def schedule_momentum(self, name: str) -> None:
        """Lets m follow a schedule from its present value: "constant" or "cosine" (to 1).

        The optimiser averages at the end of step s. MoCo v3 averages at the start of step s + 1,
        so the schedule gives the value of step s + 1.
        """
        if name == "cosine":
            self.schedules["momentum"] = partial(_momentum_after, self.momentum)

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns the trained parameters of encoder_q, and their averages in encoder_k."""
        pairs = [
            (q, k)
            for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters())
            if q.requires_grad
        ]
        return [q for q, _ in pairs], [k for _, k in pairs]

    def update_momentum_encoder(self) -> None:
        """Updates encoder_k: k = m k + (1 - m) q."""
        ema_update_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.momentum
        )


def _momentum_after(momentum: float, step: int, total_steps: int) -> float:
    return cosine_momentum(momentum, step + 1, total_steps)
