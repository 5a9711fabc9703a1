"""What methods with a momentum encoder share."""

from __future__ import annotations

import copy

from torch import nn

from mocofast.methods.base import Method
from mocofast.ops.memory import ema_update_


class MomentumMethod(Method):
    """A method whose `encoder_k` follows `encoder_q` as a moving average, of parameters only."""

    encoder_k: nn.Module

    def make_momentum_encoder(self, momentum: float) -> None:
        """Makes `encoder_k`, a copy of `encoder_q`, which has to be complete. momentum: m of the average; ValueError
        unless it is in [0, 1]."""
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]: got {momentum}")
        self.momentum = momentum
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of encoder_q that are trained, and those of encoder_k that follow them."""
        pairs = [
            (q, k)
            for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters())
            if q.requires_grad
        ]
        return [q for q, _ in pairs], [k for _, k in pairs]

    def update_momentum_encoder(self) -> None:
        """k = m k + (1 - m) q."""
        ema_update_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.momentum
        )
