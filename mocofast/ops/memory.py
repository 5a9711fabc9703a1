"""Updates the momentum encoder and the queue of keys, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from mocofast_kernels import cpu_steps
from mocofast_kernels.cpu_parts import same_layout
from mocofast_kernels.cpu_steps import Pairs
from mocofast_kernels.remembered import Remembered
from torch import Tensor

from mocofast.ops import custom_ops
from mocofast.ops.checks import check_features, check_same, check_width, described
from mocofast.ops.local import check_sharded_alike, is_plain, local_tensor


class _Seen(NamedTuple):
    """What is known of targets and sources."""

    device: torch.device  # of all tensors
    pairs: Pairs | None  # if all are of float32 and every target lies in memory as its source


_known: Remembered[_Seen] = Remembered()


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Exponential moving average in place (MoCo, arXiv:1911.05722, eq. 2).

    Writes t = m t + (1 - m) s for every target t and its source s.

    targets: tensors of any floating or complex dtype. bfloat16 and float16 are averaged in
        float32, then rounded. Integers are copied. A target listed twice is updated once.
    sources: a tensor for each target, of equal shape, on the same device.
    momentum: m in [0, 1], a float or a 0-d floating tensor.

    Sharded models (FSDP2): DTensors are averaged in place, every rank its own part. A target and
    its source have equal placements.

    Raises ValueError or TypeError, naming the argument, before anything is modified.
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(
            f"sources must be as many as targets: got {len(sources)} and {len(targets)}"
        )
    seen = None
    if not torch.compiler.is_compiling():
        both = sources + targets
        seen = _known.find(both)
        if seen is not None:
            momentum = _checked_momentum(momentum, seen.device)
            # The way of nearly every call on a CPU. After a step of training all that Python
            # touches comes from memory, so the way is short.
            if (
                seen.pairs is not None
                and not isinstance(momentum, Tensor)
                and cpu_steps.average_(targets, both, seen.pairs, 1.0 - momentum)
            ):
                return
        elif not is_plain(both):
            targets, sources = _local_pairs(targets, sources)
    with torch.no_grad():
        _update(targets, sources, momentum, None if seen is None else seen.device)


def _update(
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: float | Tensor,
    common: torch.device | None,
) -> None:
    """Averages by the kernel of every device. common: the device of tensors that are known."""
    # Group pairs by device. The common case, a single device, has a faster check.
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    common = _device_of_plain_pairs(targets, sources) if common is None else common
    if common is not None:
        groups[common] = (targets, sources)
    else:
        for i, (target, source) in enumerate(zip(targets, sources)):
            _check_pair(i, target, source)
            group = groups.setdefault(target.device, ([], []))
            group[0].append(target)
            group[1].append(source)
    # Nothing is modified before all pairs and the momentum are checked.
    for device in groups:
        momentum = _checked_momentum(momentum, device)
    for group in groups.values():
        custom_ops.ema_update_(*group, momentum)


def get_ema_multi_avg_fn(
    momentum: float = 0.999,
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """Returns `ema_update_` for torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=...).

    momentum: m in [0, 1]. ValueError or TypeError for other values.
    """
    checked = _checked_momentum(momentum, torch.device("cpu"))

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], _: Any) -> None:
        ema_update_(averaged, current, checked)

    return update


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = True) -> None:
    """Writes keys into the queue, a ring buffer, and advances the pointer (MoCo, algorithm 1).

    queue: (K, C), written in place from row `pointer` on.
    pointer: (1,) int64 in [0, K), on the device of the queue, written in place.
    keys: (B, C), any B. If B > K, the last K keys stay.
    normalize: divides every key by its L2 norm first.

    The host never waits for the device.
    Raises ValueError or TypeError, naming the argument, before anything is modified.
    """
    check_features("queue", queue, "(K, C)")
    _check_writable("queue", queue)
    check_features("keys", keys, "(B, C)")
    check_width("keys", keys, "queue", queue)
    check_same("keys", keys.device, "device of queue", queue.device)
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        raise TypeError(f"pointer must be an int64 tensor of shape (1,): got {described(pointer)}")
    if pointer.shape != (1,):
        raise ValueError(f"pointer must be an int64 tensor of shape (1,): got {described(pointer)}")
    check_same("pointer", pointer.device, "device of queue", queue.device)
    custom_ops.enqueue_(queue, pointer, keys, normalize)


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
        value = float(value.detach())
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{expected}: got {value!r}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{expected}: got {number}")
    return number


def _device_of_plain_pairs(targets: list[Any], sources: list[Any]) -> torch.device | None:
    """Returns the common device if all pairs are plain, None if `_check_pair` must look closer.

    Plain pairs are floating tensors on a single device, of equal shapes pairwise, with no expanded
    target. They pass `_check_pair`.

    Checking a property for all tensors at once costs a third of checking pair by pair. Pairs that
    pass are remembered by their properties.
    """
    both = sources + targets
    if not all(issubclass(kind, Tensor) for kind in set(map(type, both))):
        return None
    kinds = {(x.device, x.dtype, x.layout) for x in both}
    devices = {device for device, *_ in kinds}
    plain = (
        len(devices) == 1
        and all(dtype.is_floating_point and layout == torch.strided for _, dtype, layout in kinds)
        and [x.shape for x in targets] == [x.shape for x in sources]
        and all(x.is_contiguous() or 0 not in x.stride() for x in targets)
    )
    if not plain:
        return None
    (device,) = devices
    if not torch.compiler.is_compiling():
        alike = (
            kinds == {(torch.device("cpu"), torch.float32, torch.strided)}
            and not any(map(Tensor.is_neg, both))
            and all(map(same_layout, zip(targets, sources)))
        )
        _known.add(both, _Seen(device, Pairs(targets) if alike else None))
    return device


def _local_pairs(targets: list[Any], sources: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns this rank's parts of all tensors."""
    for i, (target, source) in enumerate(zip(targets, sources)):
        check_sharded_alike(f"sources[{i}]", source, f"targets[{i}]", target)
    return (
        [local_tensor(f"targets[{i}]", x) for i, x in enumerate(targets)],
        [local_tensor(f"sources[{i}]", x) for i, x in enumerate(sources)],
    )


def _check_pair(i: int, target: Any, source: Any) -> None:
    for name, value in (("targets", target), ("sources", source)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor: got {value!r}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be a dense tensor: got one of {value.layout}")
    if target.shape != source.shape:
        raise ValueError(
            f"sources[{i}] must have the shape of targets[{i}]: "
            f"got {tuple(source.shape)}, expected {tuple(target.shape)}"
        )
    if target.device != source.device:
        raise ValueError(
            f"sources[{i}] must be on the device of targets[{i}]: "
            f"got {source.device}, expected {target.device}"
        )
    if (target.is_floating_point(), target.is_complex()) != (
        source.is_floating_point(),
        source.is_complex(),
    ):
        raise TypeError(
            f"sources[{i}] and targets[{i}] must be both floating, both complex or both integer: "
            f"got {source.dtype}, {target.dtype}"
        )
    _check_writable(f"targets[{i}]", target)


def _check_writable(name: str, value: Tensor) -> None:
    if value.is_contiguous():  # true for nearly all tensors, and cheaper than reading strides
        return
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
        raise ValueError(
            f"{name} must not overlap itself: "
            f"got an expanded {described(value)}, expected its own memory"
        )
