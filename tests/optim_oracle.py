"""Oracle of the fused optimiser steps: plain formulas, tensor by tensor, in any dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from mocofast_kernels.cpu_parts import ParameterRow
from torch import Tensor


def copied(rows: list[ParameterRow], dtype: torch.dtype | None = None) -> list[ParameterRow]:
    """Returns copies of the rows in separate memory. Strides stay, gaps between elements included.

    dtype: dtype of all copies. None keeps dtypes.
    """

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
        memory = torch.zeros(max(0, size), dtype=dtype or t.dtype, device=t.device)
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    return [
        ParameterRow(*(copy(t) for t in row[:5]), tuple(copy(t) for t in row.state)) for row in rows
    ]  # type: ignore[arg-type,misc]


def values(rows: list[ParameterRow]) -> list[dict[str, Tensor]]:
    """Returns all tensors that a step may change, by name, for every row."""
    names = ("param", "target", "shadow", "target_shadow")
    found = []
    for row in rows:
        named = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
        found.append({**named, **{f"state {i}": t for i, t in enumerate(row.state)}})
    return found


def step_(kind: str, rows: list[ParameterRow], options: dict[str, Any]) -> None:
    """Makes the step of `kind` ("sgd", "lars" or "adamw") in place, in the dtype of the rows."""
    o = {name: x.item() if isinstance(x, Tensor) else x for name, x in options.items()}
    for row in rows:
        p, g = row.param, row.grad
        if g is not None and kind == "adamw":
            m, v, step = row.state
            step += 1
            p.copy_(p * (1 - o["lr"] * o["weight_decay"]))
            m.copy_(o["betas"][0] * m + (1 - o["betas"][0]) * g)
            v.copy_(o["betas"][1] * v + (1 - o["betas"][1]) * g * g)
            first, second = (1 - beta ** step.item() for beta in o["betas"])
            p.copy_(p - o["lr"] / first * m / ((v / second).sqrt() + o["eps"]))
        elif g is not None:
            decay = 0 if kind == "lars" and p.dim() <= 1 else o["weight_decay"]
            update = g + decay * p
            if kind == "lars" and p.dim() > 1:
                p_norm, d_norm = (math.sqrt(x.double().square().sum().item()) for x in (p, update))
                if p_norm > 0 and d_norm > 0:
                    update = update * (o["trust_coefficient"] * p_norm / d_norm)
            if row.state:
                row.state[0].copy_(o["momentum"] * row.state[0] + update)
                update = row.state[0]
            p.copy_(p - o["lr"] * update)
        if row.target is not None:
            row.target.copy_(o["ema_momentum"] * row.target + (1 - o["ema_momentum"]) * p)
        if row.shadow is not None:
            row.shadow.copy_(p)
        if row.target_shadow is not None:
            row.target_shadow.copy_(row.target)
