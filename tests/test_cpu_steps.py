"""Compiled steps and averages of a CPU beside PyTorch's operators, while tensors change."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from mocofast_kernels import cpu_optim, cpu_parts, cpu_steps
from mocofast_kernels.cpu_library import threads_of_openmp
from torch import Tensor, nn

from mocofast import ops
from mocofast.optim import FusedAdamW, FusedSGD

pytestmark = pytest.mark.skipif(cpu_steps._function() is None, reason="the library is not compiled")

SHAPES = ((40, 30), (7,), (6, 4, 3, 3), (1,), (0,), (2100,))


class Pair:
    """A list of parameters with targets and copies, and an optimiser."""

    def __init__(self, kind: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.generator = generator
        self.params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        self.targets = [torch.randn(s, generator=generator) for s in SHAPES]
        copies = [[x.bfloat16() for x in xs] for xs in (self.params, self.targets)]
        numbers = {"momentum": 0.9} if kind is FusedSGD else {}
        self.optimizer = kind(
            self.params,
            0.1,
            weight_decay=0.01,
            ema=(self.targets, 0.9),
            shadows=(copies[0], copies[1]),
            **numbers,
        )
        self.copies = copies[0] + copies[1]

    def gradients(self) -> None:
        for p in self.params:
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=self.generator).to(p.dtype)

    def values(self) -> list[Tensor]:
        states = [v for p in self.params for v in self.optimizer.state.get(p, {}).values()]
        return [*self.params, *self.targets, *self.copies, *states]


def _frozen(pair: Pair) -> None:
    pair.params[0].requires_grad_(False)
    pair.params[0].grad = None


def _other_memory(pair: Pair) -> None:
    pair.params[0].data = pair.params[0].data.clone()
    pair.targets[2].data = pair.targets[2].data.clone()


def _channels_last(pair: Pair) -> None:
    for x in (pair.params[2], pair.targets[2]):
        x.data = x.data.to(memory_format=torch.channels_last)


def _other_strides_of_a_gradient(pair: Pair) -> None:
    grad = pair.params[0].grad
    assert grad is not None
    pair.params[0].grad = grad.t().contiguous().t()


def _float64(pair: Pair) -> None:
    for x in (pair.params[0], pair.targets[0]):
        x.data = x.data.double()
    assert pair.params[0].grad is not None
    pair.params[0].grad = pair.params[0].grad.double()


def _resized(pair: Pair) -> None:
    p = pair.params[5]
    pair.optimizer.state.pop(p, None)
    p.data, pair.targets[5].data = p.data[:100], pair.targets[5].data[:100]
    assert p.grad is not None
    p.grad = p.grad[:100].clone()
    for copied in (pair.copies[5], pair.copies[len(SHAPES) + 5]):
        copied.data = copied.data[:100]


def _tied_targets(pair: Pair) -> None:
    pair.targets[3].data = pair.targets[1].data[:1]


def _loaded(pair: Pair) -> None:
    pair.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))


def _new_group(pair: Pair) -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    pair.optimizer.add_param_group({"params": [p], "lr": 0.5})
    pair.copies.append(p)


CHANGES: tuple[Callable[[Pair], None], ...] = (
    lambda pair: None,
    _frozen,
    _other_memory,
    _channels_last,
    _other_strides_of_a_gradient,
    _float64,
    _resized,
    _tied_targets,
    _loaded,
    _new_group,
)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_<>"))
def test_steps_see_what_changed_since_the_last_step(
    kind: Any, change: Callable[[Pair], None]
) -> None:
    ours, plain = Pair(kind), Pair(kind)
    for pair, function in ((ours, cpu_steps._function()), (plain, None)):
        with mock.patch.object(cpu_steps, "_function", return_value=function):
            for step in range(4):
                pair.gradients()
                if step == 2:
                    change(pair)
                pair.optimizer.step()
                ops.ema_update_(pair.targets, pair.params, 0.75)
    for got, want in zip(ours.values(), plain.values(), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        tolerance = 2**-7 if got.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# Threads, and OpenMP's function or None: the threads of a pool of our own.
TEAMS = [(1, None), (2, None), (2, threads_of_openmp()), (3, threads_of_openmp())]


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_the_library_takes_all_tensors_with_equal_bits_on_any_number_of_threads(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Any] = []
    monkeypatch.setattr(cpu_optim, "_in_parts", lambda rows, *_, **__: left.extend(rows))
    monkeypatch.setattr(cpu_steps, "FEW", 0)
    monkeypatch.setattr(cpu_parts, "LEAST", 128)
    pairs, before = [Pair(kind) for _ in TEAMS], torch.get_num_threads()
    try:
        for pair, (threads, openmp) in zip(pairs, TEAMS):
            torch.set_num_threads(threads)
            with mock.patch.object(cpu_steps, "threads_of_openmp", return_value=openmp):
                for _ in range(2):
                    pair.gradients()
                    pair.optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert {row.param.numel() for row in left} == {0}
    for pair in pairs[1:]:
        assert all(map(torch.equal, pairs[0].values(), pair.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other OpenMPs")
def test_threads_are_those_of_pytorch() -> None:
    assert threads_of_openmp() is not None


def test_a_backward_pass_after_a_step_is_refused_as_after_pytorchs() -> None:
    pair = Pair(FusedSGD)
    p, target = pair.params[0], pair.targets[0]
    loss = (p * p).sum()
    weight = torch.ones_like(target, requires_grad=True)
    averaged = (weight * target).sum()
    pair.gradients()
    pair.optimizer.step()
    for output in (loss, averaged):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
    averaged = (weight * target).sum()
    ops.ema_update_(pair.targets, pair.params, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        averaged.backward()


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_lost_memory_is_an_error_and_gradients_are_not_kept(kind: Any, kept: int) -> None:
    pair = Pair(kind)
    pair.gradients()
    pair.optimizer.step()
    (gradient,) = (weakref.ref(p.grad) for p in pair.params[:1])
    pair.optimizer.zero_grad()
    gc.collect()
    assert gradient() is None
    pair.gradients()
    pair.targets[1].untyped_storage().resize_(kept)  # FSDP frees parameters with 0
    with pytest.raises(ValueError, match=r"targets\[1\] must have memory"):
        pair.optimizer.step()


@pytest.mark.parametrize("momentum", [0.999, 0.25, 0.0])
def test_long_averages_follow_float64_on_any_number_of_threads(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1, 255, 1024, 5003, 70_001)
    start = [torch.randn(n) for n in sizes]
    sources = [torch.randn(n) for n in sizes]
    monkeypatch.setattr(cpu_steps, "FEW", 0)
    found, before = [], torch.get_num_threads()
    try:
        for threads, openmp in TEAMS:
            torch.set_num_threads(threads)
            targets = [t.clone() for t in start]
            with mock.patch.object(cpu_steps, "threads_of_openmp", return_value=openmp):
                for _ in range(2):  # the second call remembers the lists
                    ops.ema_update_(targets, sources, momentum)
            found.append(targets)
    finally:
        torch.set_num_threads(before)
    for one, *others, t, s in zip(*found, start, sources):
        assert all(torch.equal(one, other) for other in others)
        want = t.double()
        for _ in range(2):
            want = momentum * want + (1 - momentum) * s.double()
        torch.testing.assert_close(one.double(), want, rtol=5e-7, atol=5e-7)
    if momentum == 0:
        assert all(torch.equal(t, s) for t, s in zip(found[0], sources))


def test_copies_round_as_pytorch_does() -> None:
    values = torch.tensor([1.00390625, 1.01171875, 3.4e38, torch.inf, -torch.inf, torch.nan, -0.0])
    values = torch.cat((values, torch.randn(1000) * 10.0 ** torch.arange(-30, 30, 0.06)))
    p = nn.Parameter(values.clone())
    copied = torch.zeros(len(values), dtype=torch.bfloat16)
    FusedSGD([p], 0.1, shadows=([copied], None)).step()
    torch.testing.assert_close(copied, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(copied[6])
