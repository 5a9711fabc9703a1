"""The momentum encoders of MoCo, MoCo v3, BYOL, and of CLIP with queues."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.methods.base import Method
from mocofast.models.vit import without_drop_path
from mocofast.ops import ema_update_
from mocofast.ops.local import is_dtensor
from mocofast.optim.schedule import cosine_momentum


class MomentumMethod(Method):
    """A method whose `encoder_k` is a moving average of `encoder_q`, parameters only.

    towers: {trained encoder: its average}, names of attributes.
    """

    encoder_k: nn.Module
    towers: Mapping[str, str] = MappingProxyType({"encoder_q": "encoder_k"})

    def make_momentum_encoder(self, momentum: float) -> None:
        """Makes averages as copies of the trained encoders, which must be complete.

        momentum: m of the average. Raises ValueError unless m is in [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]: got {momentum}")
        self.momentum = momentum
        for trained, name in self.towers.items():
            average = copy.deepcopy(getattr(self, trained))
            average.requires_grad_(False)
            without_drop_path(average)
            setattr(self, name, average)

    def schedule_momentum(self, name: str) -> None:
        """Lets m follow a schedule from its present value: "constant" or "cosine" (to 1).

        The optimiser averages at the end of step s. MoCo v3 averages at the start of step s + 1,
        so the schedule gives the value of step s + 1.
        """
        if name == "cosine":
            self.schedules["momentum"] = partial(_momentum_after, self.momentum)

    def trained_pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns the trained parameters of encoder_q, and their averages in encoder_k."""
        pairs = [(q, k) for q, k in self._pairs() if q.requires_grad]
        return [q for q, _ in pairs], [k for _, k in pairs]

    def check_views(self, local_views: Sequence[Tensor] = (), **views: Tensor) -> None:
        """Checks the views, as every Method does. In train mode FSDP2 drops whole weights.

        FSDP2 keeps the whole weights of an encoder after a pass without a backward pass. Optimisers
        and averages change the parts of a rank, so the whole weights are of an earlier step.
        """
        super().check_views(local_views, **views)
        if self.training:
            for encoder in (*self.towers, *self.towers.values()):
                for part in getattr(self, encoder).modules():
                    if _is_fsdp(part):
                        part.reshard()

    def update_momentum_encoder(self) -> None:
        """Updates encoder_k: k = m k + (1 - m) q.

        Raises RuntimeError where FSDP2 shards the method, but no encoder: all weights are whole
        during the forward pass, and FSDP2 would drop every change.
        """
        queries, keys = zip(*self._pairs())
        if _is_fsdp(self) and not all(map(is_dtensor, keys)):
            query, key = next(iter(self.towers.items()))
            raise RuntimeError(
                f"FSDP2 shards the model as a whole, so the average of {key} would be lost. Shard "
                f"the encoders before it: fully_shard(model.{query}), fully_shard(model.{key}), "
                "then fully_shard(model)"
            )
        ema_update_(list(keys), list(queries), self.momentum)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for trained, average in self.towers.items():
            queries, keys = (list(getattr(self, x).parameters()) for x in (trained, average))
            if len(queries) != len(keys):
                raise ValueError(
                    f"{average} must have the parameters of {trained}: got {len(keys)} and "
                    f"{len(queries)}. After a change of {trained}, call make_momentum_encoder"
                )
            pairs += zip(queries, keys)
        return pairs


def _is_fsdp(module: Any) -> bool:
    """Returns whether FSDP2 shards a module, without importing FSDP2."""
    if torch.compiler.is_compiling():
        return False
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def _momentum_after(momentum: float, step: int, total_steps: int) -> float:
    return cosine_momentum(momentum, step + 1, total_steps)
