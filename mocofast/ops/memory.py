"""The momentum encoder's average and the queue of keys, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mocofast.ops.checks import check_matrix, check_same, described
from mocofast.ops.losses import autograd


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Exponential moving average in place: t = m t + (1 - m) s for every pair (MoCo, arXiv:1911.05722, eq. 2).

    targets, sources: equally many tensors, of equal shapes and devices pairwise, of any floating dtypes (bfloat16
    and float16 are averaged in float32, then rounded) or integers, which are copied. A tensor listed twice is
    updated once. momentum: m in [0, 1], a float or a 0-d floating tensor.
    Raises ValueError or TypeError naming the argument, before anything is modified.
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(
            f"sources must be as many as targets: got {len(sources)} and {len(targets)}"
        )
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    if (common := _device_of_plain_pairs(targets, sources)) is not None:
        groups[common] = (targets, sources)
    else:
        for i, (target, source) in enumerate(zip(targets, sources)):
            _check_pair(i, target, source)
            group = groups.setdefault(target.device, ([], []))
            group[0].append(target)
            group[1].append(source)
    for device in groups:
        momentum = _checked_momentum(momentum, device)
    for group in groups.values():
        autograd.ema_update_(*group, momentum)


def get_ema_multi_avg_fn(
    momentum: float = 0.999,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """`ema_update_` for torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=...); momentum in [0, 1]."""
    checked = _checked_momentum(momentum, torch.device("cpu"))

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], _: Any) -> None:
        ema_update_(averaged, current, checked)

    return update


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = True) -> None:
    """Write keys into a ring buffer in place, from row `pointer` on, and advance the pointer (MoCo, algorithm 1).

    queue: (K, C); keys: (B, C), B of any size (where B > K the last K keys stay); pointer: (1,) int64 on the same
    device, in [0, K). normalize: divide each key by its L2 norm first. No host synchronisation.
    Raises ValueError or TypeError naming the argument, before anything is modified.
    """
    check_matrix("queue", queue, "(K, C)")
    _check_writable("queue", queue)
    check_matrix("keys", keys, "(B, C)")
    check_same("keys", keys.shape[1], "second dimension of queue", queue.shape[1])
    check_same("keys", keys.device, "device of queue", queue.device)
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        raise TypeError(f"pointer must be an int64 tensor of shape (1,): got {described(pointer)}")
    if pointer.shape != (1,):
        raise ValueError(f"pointer must be an int64 tensor of shape (1,): got {described(pointer)}")
    check_same("pointer", pointer.device, "device of queue", queue.device)
    autograd.enqueue_(queue, pointer, keys, normalize)


def _checked_momentum(value: Any, device: torch.device) -> float | Tensor:
    expected = "momentum must be a float in [0, 1] or a 0-d floating tensor"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{expected}: got {described(value)}")
        if value.dim() != 0:
            raise ValueError(f"{expected}: got {described(value)}")
        check_same("momentum", value.device, "device of targets", device)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return value
        value = float(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{expected}: got {value!r}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{expected}: got {number}")
    return number


def _device_of_plain_pairs(targets: list[Any], sources: list[Any]) -> torch.device | None:
    """The device of equally many tensors that pass `_check_pair` at a glance: all floating, on one device, of equal
    shapes pairwise, no target expanded. None where they need its closer look, whether they then pass or not.

    Looking at all tensors for one property at a time costs a third of asking pair by pair. Nothing is remembered from
    one call to the next: storage, shape and dtype of a tensor may all be replaced in place.
    """
    both = targets + sources
    if not all(issubclass(kind, Tensor) for kind in set(map(type, both))):
        return None
    devices = {x.device for x in both}
    plain = (
        len(devices) == 1
        and all(dtype.is_floating_point for dtype in {x.dtype for x in both})
        and [x.shape for x in targets] == [x.shape for x in sources]
        and all(x.is_contiguous() or 0 not in x.stride() for x in targets)
    )
    return devices.pop() if plain else None


def _check_pair(i: int, target: Any, source: Any) -> None:
    for name, value in (("targets", target), ("sources", source)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor: got {value!r}")
    if target.shape != source.shape:
        raise ValueError(
            f"sources[{i}] must have the shape of targets[{i}]: "
            f"got {tuple(source.shape)}, expected {tuple(target.shape)}"
        )
    if target.device != source.device:
        raise ValueError(
            f"sources[{i}] must be on the device of targets[{i}]: got {source.device}, expected {target.device}"
        )
    if target.is_floating_point() != source.is_floating_point():
        raise TypeError(
            f"sources[{i}] and targets[{i}] must be both floating or both integer: got {source.dtype}, {target.dtype}"
        )
    _check_writable(f"targets[{i}]", target)


def _check_writable(name: str, value: Tensor) -> None:
    if value.is_contiguous():  # which nearly all are, and costs less to ask
        return
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
        raise ValueError(
            f"{name} must not overlap itself: got an expanded {described(value)}, expected its own memory"
        )
