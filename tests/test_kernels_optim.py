"""Checks fused optimiser steps of the CPU and of Triton against float64.

Without a GPU the kernels run in Triton's interpreter.

The rule: the error is at most the error of the formulas, written out in PyTorch in the tensors'
types, plus `SLACK` units in the last place of the largest value.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mocofast_kernels import cpu_optim, cpu_parts, cpu_steps
from mocofast_kernels.cpu_parts import ParameterRow
from torch import Tensor

from tests.optim_oracle import copied, step_, values
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import optim, tables

KINDS = ("sgd", "lars", "adamw")


class WithoutLibrary:
    """`cpu_optim` where no compiler made the library."""

    __name__ = "without library"

    def __getattr__(self, name: str) -> Any:
        def step(*args: Any, **kwargs: Any) -> None:
            with mock.patch.object(cpu_steps, "_function", return_value=None):
                getattr(cpu_optim, name)(*args, **kwargs)

        return step


BACKENDS: tuple[Any, ...] = (optim, cpu_optim, WithoutLibrary())
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 2.0

# 1, a prime, a whole block, two blocks and an element, matrices (LARS takes norms): a size that
# rules out wide loads, and several blocks. A 3x3 convolution, which may be channels-last, a 1x1
# convolution, an empty tensor, a scalar.
SHAPES = ((1,), (13,), (2048,), (4097,), (3, 5), (64, 97), (8, 3, 3, 3), (16, 8, 1, 1), (0,), ())


def _device(backend: Any) -> str:
    return DEVICE if backend is optim else "cpu"


def _options(kind: str, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05, "ema_momentum": 0.99}
    if kind == "adamw":
        options |= {"betas": (0.9, 0.999), "eps": 0.01}  # large enough to count
    else:
        options |= {"momentum": 0.9}
    if kind == "lars":
        options |= {"trust_coefficient": 0.001}
    return {**options, **{name: value for name, value in changes.items() if name in options}}


def _rows(
    kind: str,
    shapes: Any,
    dtype: torch.dtype,
    seed: int,
    device: str,
    *,
    layout: str = "contiguous",
    momentum: bool = True,
    missing: bool = False,
    companions: bool = True,
) -> list[ParameterRow]:
    """Returns rows with the state of earlier steps. missing: every second row has no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def sample(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if layout == "channels_last" and len(shape) == 4:
            values = values.to(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack([values, values], dim=-1).to(device, dtype)[..., 0]
        return values.to(device, dtype)

    rows = []
    for i, shape in enumerate(shapes):
        grad = None if missing and i % 2 else sample(shape)
        state: tuple[Tensor, ...] = ()
        if grad is not None and kind == "adamw":
            state = (sample(shape), sample(shape).abs(), torch.tensor(float(i), device=device))
        elif grad is not None and momentum:
            state = (sample(shape),)
        companion_tensors = (
            sample(shape, torch.float32),
            sample(shape, torch.bfloat16),
            sample(shape, torch.float16),
        )
        rows.append(
            ParameterRow(
                sample(shape),
                grad,
                *(companion_tensors if companions else (None, None, None)),
                state,
            )
        )
    return rows


def _run(backend: Any, kind: str, rows: list[ParameterRow], options: dict[str, Any]) -> None:
    getattr(backend, f"{kind}_")(rows, **options)


def _check(kind: str, backend: Any, rows: list[ParameterRow], options: dict[str, Any]) -> None:
    """Makes two steps, so that the second step reads the state written by the first."""
    ours, eager, exact = copied(rows), copied(rows), copied(rows, torch.float64)
    for _ in range(2):
        _run(backend, kind, ours, options)
        step_(kind, eager, options)
        step_(kind, exact, options)
    for row, got, plain, true in zip(rows, values(ours), values(eager), values(exact)):
        if row.param.numel() == 0:
            continue
        for name, x in got.items():
            if name == "state 2":  # the step count
                assert x == true[name]
                continue
            # The average and the copies inherit the rounding of a parameter of a narrower type.
            source = {"shadow": "param", "target_shadow": "target"}.get(name, name)
            coarse = max(torch.finfo(t).eps for t in (x.dtype, row.param.dtype, got[source].dtype))
            expected = true[source]
            allowed = _error(plain[name], expected) + SLACK * coarse * max(
                1.0, expected.abs().max().item()
            )
            assert _error(x, expected) <= allowed, (
                name,
                row.param.shape,
                _error(x, expected),
                allowed,
            )
        for copy, source in (("shadow", "param"), ("target_shadow", "target")):
            if copy in got:  # rounded from the stored values, not from unrounded values
                assert torch.equal(got[copy], got[source].to(got[copy].dtype))


def _error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    dtype=st.sampled_from(TYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    momentum=st.booleans(),
    missing=st.booleans(),
    companions=st.booleans(),
    threads=st.sampled_from([1, 2]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    ema_momentum=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_step_equals_its_formulas(
    backend: Any,
    kind: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    layout: str,
    momentum: bool,
    missing: bool,
    companions: bool,
    threads: int,
    weight_decay: float,
    ema_momentum: float,
    seed: int,
) -> None:
    """CPUs with several threads change to a thread that computes alone."""
    rows = _rows(
        kind,
        shapes,
        dtype,
        seed,
        _device(backend),
        layout=layout,
        momentum=momentum,
        missing=missing,
        companions=companions,
    )
    changes = {"weight_decay": weight_decay, "ema_momentum": ema_momentum}
    with mock.patch.object(torch, "get_num_threads", return_value=threads):
        _check(
            kind,
            backend,
            rows,
            _options(kind, **changes, **({} if momentum else {"momentum": 0.0})),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_one_row_may_lie_and_be_stored_differently(backend: Any, kind: str) -> None:
    """Mixes a channels-last weight and a contiguous gradient, bfloat16 state, a float64 row."""
    device = _device(backend)
    rows = _rows(
        kind, SHAPES[6:8] * 2 + SHAPES[:2], torch.float32, 5, device, layout="channels_last"
    )
    assert rows[0].grad is not None
    rows[0] = rows[0]._replace(grad=rows[0].grad.contiguous())
    # The strides of a 1x1 convolution can be written in two ways. The layouts count as equal, so no
    # copies are made.
    one = torch.randn(16, 8, 1, 1, device=device)
    assert one.stride() != rows[1].param.stride() and cpu_parts.same_layout([one, rows[1].param])
    rows[1] = rows[1]._replace(grad=one)
    rows[2] = rows[2]._replace(state=(rows[2].state[0].bfloat16(), *rows[2].state[1:]))
    rows[3] = copied(rows[3:4], torch.float64)[0]
    _check(kind, backend, rows, _options(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_may_be_tensors(backend: Any, kind: str) -> None:
    device = _device(backend)
    rows = _rows(kind, SHAPES[3:6], torch.float32, 6, device)
    names = {
        "lr": 0.25,
        "weight_decay": 0.5,
        "ema_momentum": 0.75,
        "momentum": 0.5,
        "trust_coefficient": 0.125,
    }
    floats, tensors = copied(rows), copied(rows)
    _run(backend, kind, floats, _options(kind, **names))
    # Powers of two are exact in float32, in a float64 tensor, and subtracted from 1.
    _run(
        backend,
        kind,
        tensors,
        _options(kind, **{n: torch.tensor(x, device=device) for n, x in names.items()}),
    )
    for a, b in zip(values(floats), values(tensors)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_steps_are_equal_bit_for_bit(backend: Any, kind: str) -> None:
    """The shape (300, 99) takes 15 blocks, whose sums LARS adds for the norms."""
    rows = _rows(kind, ((300, 99), (4097,), (5, 3)), torch.float32, 7, _device(backend))
    first, second = copied(rows), copied(rows)
    _run(backend, kind, first, _options(kind))
    _run(backend, kind, second, _options(kind))
    for a, b in zip(values(first), values(second)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_neither_divided_by_nor_scaled(backend: Any) -> None:
    """LARS with |p| = 0 (MoCo's zero-initialised weights), |d| = 0, and |p| = |d| = 0."""
    device = _device(backend)
    one, zero = torch.ones(3, 4, device=device), torch.zeros(3, 4, device=device)
    pairs = ((zero, one), (one, zero), (zero, zero), (one, one))
    rows = [ParameterRow(p.clone(), g, None, None, None, ()) for p, g in pairs]
    _run(backend, "lars", rows, _options("lars", weight_decay=0.0, momentum=0.0, lr=0.5))
    for row, expected in zip(rows, (-0.5, 1.0, 0.0, 1 - 0.5 * 0.001)):
        torch.testing.assert_close(row.param, torch.full((3, 4), expected, device=device))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_nan_reaches_its_own_tensors_only(backend: Any, kind: str) -> None:
    rows = _rows(kind, ((5, 7), (5, 7)), torch.float32, 8, _device(backend))
    assert rows[0].grad is not None
    rows[0].grad[1, 2] = float("nan")
    _run(backend, kind, rows, _options(kind))
    nan, clean = values(rows)
    for name in ("param", "target", "shadow", "target_shadow", "state 0"):
        assert nan[name][1, 2].isnan() and not clean[name].isnan().any()


def test_bias_corrections_keep_their_digits() -> None:
    """In float32 1 - .999^step would lose 4 digits. At step 1 the update is lr by definition."""
    for step in (0, 1, 9, 999, 99_999):
        zeros = [torch.zeros(3, device=DEVICE) for _ in range(3)]
        state = (zeros[1], zeros[2], torch.tensor(float(step), device=DEVICE))
        grad = torch.full((3,), 0.5, device=DEVICE)
        row = ParameterRow(zeros[0], grad, None, None, None, state)
        optim.adamw_([row], lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, ema_momentum=0.0)
        first, second = 0.1 / (1 - 0.9 ** (step + 1)), 0.001 / (1 - 0.999 ** (step + 1))
        assert row.param[0].item() == pytest.approx(-first / second**0.5, rel=5e-7)


def test_a_replaced_storage_is_found_and_the_old_one_left_alone() -> None:
    rows = _rows("sgd", ((40,), (6, 8)), torch.float32, 9, DEVICE)
    options = _options("sgd")
    _run(optim, "sgd", rows, options)
    param = rows[0].param
    old, kept = param.data, param.clone()
    param.data = param.data.clone()
    _run(optim, "sgd", rows, options)
    assert torch.equal(old, kept) and not torch.equal(param, kept)


def test_tables_are_kept_and_a_few_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    upload = tables._upload
    monkeypatch.setattr(tables, "_upload", lambda t, device: made.append(t) or upload(t, device))
    cache = tables.TableCache(8)
    row = [torch.ones(9, device=DEVICE)]
    plan = cache.plan([row], 1)
    count = len(made)
    assert cache.plan([row], 1) is plan and len(made) == count
    assert plan.tables[0].owners.tolist() == [[0, 0], [0, 1]]  # 9 elements are 2 blocks of 8
    others = [[torch.ones(1, device=DEVICE)] for _ in range(tables.PLANS)]
    for other in others:
        cache.plan([other], 1)
    assert cache.plan([row], 1) is not plan


class _Stream:
    """Stands for a CUDA stream: remembers the events that it waited for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited = number, []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def test_tables_of_a_captured_graph_stay_and_other_streams_wait_for_an_upload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing, current, recorded = False, _Stream(1), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    upload = tables._Upload(1, "done")  # type: ignore[arg-type]
    monkeypatch.setattr(tables, "_uploaded", lambda made: upload)
    cache = tables.TableCache(8)
    row, other = ([torch.ones(9, device=DEVICE)] for _ in range(2))
    plan, evicted = cache.plan([row], 1), cache.plan([other], 1)
    assert cache.plan([row], 1) is plan and not current.waited and not recorded
    # Another stream waits for the upload, and holds the memory of the table.
    current = _Stream(2)
    assert cache.plan([row], 1) is plan
    assert current.waited == ["done"] and recorded == [current] * 4
    # A capture keeps the table, whatever tensors come later.
    capturing = True
    assert cache.plan([row], 1) is plan and len(current.waited) == 1
    capturing = False
    later = [[torch.ones(1, device=DEVICE)] for _ in range(tables.PLANS)]
    for tensors in later:
        cache.plan([tensors], 1)
    assert cache.plan([row], 1) is plan
    assert cache.plan([other], 1) is not evicted


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_follows_the_rate_and_equals_an_eager_one(kind: str) -> None:
    rows = _rows(kind, SHAPES[1:6], torch.float32, 10, "cuda")
    captured, eager = copied(rows), copied(rows)
    lr = torch.tensor(0.1, device="cuda")
    options = _options(kind, lr=lr)
    _run(optim, kind, captured, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(optim, kind, captured, options)
    with pytest.raises(RuntimeError, match="no table"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        _run(optim, kind, copied(rows), options)
    for rate in (0.1, 0.1, 0.3):
        _run(optim, kind, eager, _options(kind, lr=rate))
    graph.replay()
    lr.fill_(0.3)
    graph.replay()
    for a, b in zip(values(captured), values(eager)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_steady_step_never_waits_for_the_gpu(kind: str) -> None:
    rows = _rows(kind, SHAPES[1:6], torch.float32, 11, "cuda")
    for _ in range(2):
        _run(optim, kind, rows, _options(kind))
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(optim, kind, rows, _options(kind))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parts_on_threads_compute_the_bits_of_whole_tensors(
    kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ((5000,), (13,), (70, 97), (24, 16, 3, 3), (0,), (3, 5), (1,))
    whole, divided = (
        _rows(kind, shapes, torch.float32, 4, "cpu", layout=layout, missing=True) for _ in range(2)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(2):
            _run(cpu_optim, kind, whole, _options(kind))
        monkeypatch.setattr(cpu_parts, "LARGEST", 640)
        monkeypatch.setattr(cpu_parts, "LEAST", 128)
        monkeypatch.setattr(cpu_steps, "FEW", 0)
        torch.set_num_threads(3)
        for _ in range(2):
            _run(cpu_optim, kind, divided, _options(kind))
    finally:
        torch.set_num_threads(before)
    for want, got in zip(values(whole), values(divided)):
        assert all(torch.equal(got[name], want[name]) for name in want)
