"""Contrastive losses, EMA and key queue on fused kernels: torch only, importable into any other training code.

CUDA tensors go to Triton kernels, all others to blocked PyTorch; importing this needs neither a GPU nor Triton.
Arguments are checked here, so that nothing is modified by a call that raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mocofast import autograd

__all__ = ["clip_loss", "ema_update_", "enqueue_", "get_ema_multi_avg_fn", "info_nce", "nt_xent"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: Literal[False] = False,
    negatives_normalized: bool = False,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: Literal[True],
    negatives_normalized: bool = False,
) -> tuple[Tensor, Tensor]: ...


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: bool = False,
    negatives_normalized: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4), as MoCo uses it (arXiv:1911.05722, eq. 1):
    loss_i = -log exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.n_j / T)).

    query, positive_key: (N, C); negative_keys: (K, C), or None for in-batch negatives (row i's negatives are the
        positive keys of all other rows). float32, bfloat16 or float16, mixed if need be; any strides.
    temperature: T > 0, a float or a 0-d tensor (which gets a gradient; its value is checked on the CPU only, as a
        check on CUDA would synchronise the host).
    reduction: "mean" or "sum", giving (), or "none", giving (N,).
    normalize: divide all three by their L2 norms over C, inside the kernel.
    return_rank: also return (N,) int32, how many negatives score above the positive: Acc@k is mean(rank < k).
    negatives_normalized: with `normalize`, promise that the negatives are unit vectors already, as a queue's are.
        Longer vectors may then overflow to inf.

    Returns the float32 loss, or (loss, rank). Gradients reach whichever of the inputs require them, in their own
    dtypes; no N x K array is kept. The negatives may be overwritten before `backward` unless they need a gradient.
    Raises ValueError or TypeError naming the argument. There is no second derivative: asking for it raises.
    """
    _check_matrix("query", query, "(N, C)")
    _check_matrix("positive_key", positive_key, "(N, C)")
    _check_same("positive_key", positive_key.shape, "shape of query", query.shape)
    _check_same("positive_key", positive_key.device, "device of query", query.device)
    if negative_keys is not None:
        _check_matrix("negative_keys", negative_keys, "(K, C)")
        _check_same("negative_keys", negative_keys.shape[1], "second dimension of query", query.shape[1])
        _check_same("negative_keys", negative_keys.device, "device of query", query.device)
    temperature = _checked_temperature(temperature, query.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    in_batch = negative_keys is None
    loss, rank = autograd.info_nce(
        query,
        positive_key,
        positive_key if negative_keys is None else negative_keys,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize and (in_batch or not negatives_normalized),
        exclude_period=len(query) if in_batch else 0,
        return_rank=return_rank,
        reduction=reduction,
    )
    return (loss, rank) if return_rank else loss


def nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float | Tensor = 0.5, reduction: str = "mean") -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1): each of the 2N views against the 2N - 2 others.

    z_a, z_b: (N, C), two views of the same N images; normalised inside. Dtypes, errors and temperature as in
    `info_nce`. reduction: over the 2N views, those of z_a first. Returns float32, () or (2N,).
    """
    _check_matrix("z_a", z_a, "(N, C)")
    _check_matrix("z_b", z_b, "(N, C)")
    _check_same("z_b", z_b.shape, "shape of z_a", z_a.shape)
    _check_same("z_b", z_b.device, "device of z_a", z_a.device)
    temperature = _checked_temperature(temperature, z_a.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    views = torch.cat([z_a, z_b])
    loss, _ = autograd.info_nce(
        views,
        torch.cat([z_b, z_a]),
        views,
        temperature,
        normalize=True,
        normalize_negatives=True,
        exclude_period=len(z_a),  # leaves out the view itself and its positive, which has its own term
        return_rank=False,
        reduction=reduction,
    )
    return loss


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, arXiv:2103.00020, fig. 3): the mean of images against texts and
    texts against images.

    image_features, text_features: (N, C), used as they are: normalise them before, as CLIP does.
    logit_scale: the multiplier of the dot products itself (1 / T, not its logarithm), a float or a 0-d tensor.
    Returns () float32. Dtypes and errors as in `info_nce`.
    """
    _check_matrix("image_features", image_features, "(N, C)")
    _check_matrix("text_features", text_features, "(N, C)")
    _check_same("text_features", text_features.shape, "shape of image_features", image_features.shape)
    _check_same("text_features", text_features.device, "device of image_features", image_features.device)
    scale = _checked_temperature(logit_scale, image_features.device, "logit_scale")
    pairs = ((image_features, text_features), (text_features, image_features))
    losses = [
        autograd.info_nce(
            query,
            key,
            key,
            1.0 / scale,
            normalize=False,
            normalize_negatives=False,
            exclude_period=len(query),
            return_rank=False,
            reduction="mean",
        )[0]
        for query, key in pairs
    ]
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Exponential moving average in place: t = m t + (1 - m) s for every pair (MoCo, arXiv:1911.05722, eq. 2).

    targets, sources: equally many tensors, of equal shapes and devices pairwise, of any floating dtypes (bfloat16
    and float16 are averaged in float32, then rounded) or integers, which are copied. A tensor listed twice is
    updated once. momentum: m in [0, 1], a float or a 0-d floating tensor.
    Raises ValueError or TypeError naming the argument, before anything is modified.
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources):
        raise ValueError(f"sources must be as many as targets: got {len(sources)} and {len(targets)}")
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


def get_ema_multi_avg_fn(momentum: float = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
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
    _check_matrix("queue", queue, "(K, C)")
    _check_writable("queue", queue)
    _check_matrix("keys", keys, "(B, C)")
    _check_same("keys", keys.shape[1], "second dimension of queue", queue.shape[1])
    _check_same("keys", keys.device, "device of queue", queue.device)
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        raise TypeError(f"pointer must be an int64 tensor of shape (1,): got {_described(pointer)}")
    if pointer.shape != (1,):
        raise ValueError(f"pointer must be an int64 tensor of shape (1,): got {_described(pointer)}")
    _check_same("pointer", pointer.device, "device of queue", queue.device)
    autograd.enqueue_(queue, pointer, keys, normalize)


def _described(value: Any) -> str:
    return f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _check_matrix(name: str, value: Any, shape: str) -> None:
    expected = f"{name} must be a float32, bfloat16 or float16 tensor of shape {shape}, not empty"
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(f"{expected}: got {_described(value)}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{expected}: got {_described(value)}")


def _check_same(name: str, got: Any, what: str, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"{name} must match the {what}: got {_plain(got)}, expected {_plain(expected)}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _checked_temperature(value: Any, device: torch.device, name: str = "temperature") -> float | Tensor:
    expected = f"{name} must be a finite float > 0 or a 0-d floating tensor"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{expected}: got {_described(value)}")
        if value.dim() != 0:
            raise ValueError(f"{expected}: got {_described(value)}")
        _check_same(name, value.device, "device of the features", device)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return value
        number = float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = number = float(value)
    else:
        raise TypeError(f"{expected}: got {value!r}")
    if not 0 < number < math.inf:
        raise ValueError(f"{expected}: got {number}")
    return value


def _checked_momentum(value: Any, device: torch.device) -> float | Tensor:
    expected = "momentum must be a float in [0, 1] or a 0-d floating tensor"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{expected}: got {_described(value)}")
        if value.dim() != 0:
            raise ValueError(f"{expected}: got {_described(value)}")
        _check_same("momentum", value.device, "device of targets", device)
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
            f"{name} must not overlap itself: got an expanded {_described(value)}, expected its own memory"
        )
