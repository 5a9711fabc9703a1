"""The blocked PyTorch kernels against float64: InfoNCE, EMA, enqueue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mocofast_bench import eager_formulas
from mocofast_kernels import cpu, cpu_memory, cpu_products, cpu_sweep
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from tests.oracle import info_nce_oracle, rank_bounds

EPS = torch.finfo(torch.float32).eps


def forward(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float | Tensor, **changes: Any
) -> Any:
    options: dict[str, Any] = {
        "normalize": True,
        "normalize_negatives": True,
        "exclude_period": 0,
        "return_rank": True,
        "compute_grad": True,
        "only_query": False,
        "dot_dtype": torch.float32,
    }
    return cpu.infonce_forward(query, positive, negatives, temperature, **{**options, **changes})


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Products of a large problem come from the compiled sweep, from oneDNN where there is no sweep, or
# from `torch.mm` in builds of PyTorch without oneDNN.
@pytest.mark.parametrize("products", ["compiled", "oneDNN", "mm"])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.2, torch.tensor(0.2)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("count", "size", "dim"),
    [
        (1, 1, 1),  # the smallest
        (7, 13, 5),  # primes
        (513, 300, 3),  # one row more than a block
        (3, 8193, 129),  # several blocks, the last one ragged
    ],
)
def test_every_field_matches_float64(
    count: int,
    size: int,
    dim: int,
    normalize: bool,
    temperature: float | Tensor,
    products: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if products != "compiled":
        monkeypatch.setattr(cpu_sweep, "sweep_of", lambda rows: None)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", products == "oneDNN")
    # Raw dot products of this size stay comparable with unit vectors'.
    spread = 1.0 if normalize else dim**-0.5
    query, positive, negatives = (
        features(i, n, dim) * spread for i, n in enumerate((count, count, size))
    )
    result = forward(
        query, positive, negatives, temperature, normalize=normalize, normalize_negatives=normalize
    )

    q, k = (x.double().requires_grad_() for x in (query, positive))
    scale = torch.full((count,), 1.0 / float(temperature), dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            info_nce_oracle(
                q[i : i + 1], k[i : i + 1], negatives, 1 / scale[i], normalize, normalize
            )[0]
            for i in range(count)
        ]
    )
    grad_query, grad_positive, grad_scale = torch.autograd.grad(expected.sum(), (q, k, scale))
    # Rounding of the scores (|s| <= about 4 here) is amplified by 1/T in every quantity.
    slack = 8 * EPS * max(1.0, 4 / float(temperature))
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=slack, atol=slack)
    # A gradient may vanish (C = 1: a unit vector is a sign), so errors are measured against 1/T,
    # the bound of a gradient.
    for got, want in (
        (result.grad_query, grad_query),
        (result.grad_positive, grad_positive),
        (result.grad_scale / float(temperature), grad_scale / float(temperature)),
    ):
        torch.testing.assert_close(
            got.double(), want, rtol=slack, atol=4 * EPS / float(temperature)
        )
    low, high = rank_bounds(query, positive, negatives, 8 * EPS, normalize, normalize)
    assert bool(((low <= result.rank) & (result.rank <= high)).all())


def test_unasked_fields_are_none() -> None:
    result = forward(
        features(0, 3, 4),
        features(1, 3, 4),
        features(2, 5, 4),
        0.1,
        return_rank=False,
        compute_grad=False,
    )
    assert result.rank is None
    assert result.grad_query is None
    assert result.grad_positive is None
    assert result.grad_scale is None


@pytest.mark.parametrize("temperature", [0.01, 0.1])  # with and without a maximum
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# The last shape is too large for `one_block`.
@pytest.mark.parametrize(("count", "size", "dim"), [(5, 9, 4), (1, 300, 7), (520, 300, 16)])
def test_asking_for_the_querys_gradient_alone_changes_none_of_it(
    count: int, size: int, dim: int, dtype: torch.dtype, normalized: bool, temperature: float
) -> None:
    query, positive = features(0, count, dim), features(1, count, dim)
    negatives = F.normalize(features(2, size, dim))
    if count > 3:  # a vector without a direction, a short one, and NaN
        query[0], query[1], query[2, 0] = 0, query[1] * 1e-20, math.nan
    everything, alone = (
        forward(
            *(x.to(dtype) for x in (query, positive, negatives)),
            temperature,
            only_query=only_query,
            normalize_negatives=not normalized,
        )
        for only_query in (False, True)
    )
    # A few rows are the compiled library's, which sums in another order.
    is_compiled = temperature == 0.1 and cpu_sweep.compiled(torch.float32)[0] is not None
    slack = 1e-5 if is_compiled else 0
    for name in ("loss", "rank", "grad_query"):
        pair = getattr(everything, name), getattr(alone, name)
        torch.testing.assert_close(*pair, rtol=slack, atol=slack, equal_nan=True, msg=name)
    assert alone.lse is alone.grad_positive is alone.grad_scale is None


# Without oneDNN, as in other builds of PyTorch, matrix products run elsewhere.
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize(
    ("count", "period"), [(1, 1), (5, 5), (263, 263), (526, 263), (600, 3), (2, 1)]
)
def test_excluded_negatives_neither_count_nor_get_a_gradient(
    count: int, period: int, temperature: float, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-batch (P = N), SimCLR (P = N / 2), several blocks both ways, no negatives (P = 1)."""
    monkeypatch.setattr(cpu, "ROWS", 64)
    monkeypatch.setattr(cpu, "LOGITS", 64 * 256)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    query, keys = features(0, count, 6), features(1, count, 6)
    result = forward(query, keys, keys, temperature, exclude_period=period)
    q, k, negatives = (x.double().requires_grad_() for x in (query, keys, keys))
    expected = info_nce_oracle(q, k, negatives, temperature, exclude_period=period)
    grads = torch.autograd.grad(expected.sum(), (q, k, negatives))
    got = cpu.infonce_grad_negatives(
        torch.ones(count),
        query,
        keys,
        result.lse,
        temperature,
        normalize=True,
        normalize_negatives=True,
        exclude_period=period,
        dot_dtype=torch.float32,
    )
    slack = 32 * EPS / temperature
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=slack, atol=slack)
    for ours, want in zip((result.grad_query, result.grad_positive, got), grads):
        torch.testing.assert_close(ours.double(), want, rtol=slack, atol=slack / temperature)
    if period == 1:
        assert bool((result.loss == 0).all())
        assert not got.any()


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 70),
    dim=st.integers(1, 40),
    temperature=st.floats(0.005, 1.0),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 3),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 2**16),
)
def test_any_size_type_and_stride_gives_the_float64_loss_and_negatives_gradient(
    count: int,
    size: int,
    dim: int,
    temperature: float,
    dtypes: tuple[torch.dtype, ...],
    layout: str,
    seed: int,
) -> None:
    def made(offset: int, rows: int, dtype: torch.dtype) -> Tensor:
        if layout == "transposed":
            return features(seed + offset, dim, rows).to(dtype).t()
        if layout == "strided":
            return features(seed + offset, 2 * rows, 3 * dim).to(dtype)[::2, ::3]
        if layout == "expanded":
            return features(seed + offset, 1, dim).to(dtype).expand(rows, dim)
        return features(seed + offset, rows, dim).to(dtype)

    query, positive, negatives = (
        made(i, n, t) for i, (n, t) in enumerate(zip((count, count, size), dtypes))
    )
    weights = features(seed + 3, count)
    result = forward(query, positive, negatives, temperature)
    got = cpu.infonce_grad_negatives(
        weights,
        query,
        negatives,
        result.lse,
        temperature,
        normalize=True,
        normalize_negatives=True,
        exclude_period=0,
        dot_dtype=torch.float32,
    )
    wide = negatives.double().requires_grad_()
    expected = info_nce_oracle(query, positive, wide, temperature)
    (want,) = torch.autograd.grad((expected * weights).sum(), wide)
    slack = 8 * EPS * max(1.0, 1 / temperature)
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=slack, atol=slack)
    # The bound of a negative's gradient: 1 / (T |n|) times the weights.
    bound = float(weights.abs().sum()) / temperature / negatives.double().norm(dim=1, keepdim=True)
    assert bool(((got - want).abs() <= slack * bound).all())


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("exclude_period", [0, 3000])
def test_bfloat16_operands_are_as_exact_as_their_rounding(
    exclude_period: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "cpu_bf16", lambda: "AVX512-BF16")
    count, size, dim = 30, 3000, 40
    query, positive = features(0, count, dim), features(1, count, dim)
    negatives, weights = features(2, size, dim), features(3, count)
    options = {"exclude_period": exclude_period, "dot_dtype": torch.bfloat16}
    result = forward(query, positive, negatives, temperature, **options)
    in_float32 = forward(query, positive, negatives, temperature, exclude_period=exclude_period)
    assert not torch.equal(result.loss, in_float32.loss)  # the operands were rounded

    q, n = query.double().requires_grad_(), negatives.double().requires_grad_()
    units, keys = F.normalize(q), F.normalize(positive.double())
    logits = units @ F.normalize(n).T
    if exclude_period:
        own = torch.arange(count)[:, None] % exclude_period == torch.arange(size) % exclude_period
        logits = logits.masked_fill(own, -math.inf)
    logits = torch.cat([(units * keys).sum(1, keepdim=True), logits], 1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(count, dtype=torch.long), reduction="none")
    grad_query, grad_negatives = torch.autograd.grad((loss * weights).sum(), (q, n))
    # A unit vector's operands and the rounded logit are off by 2^-9 each: at most 2^-7 / T.
    slack = 2**-7 / temperature
    assert (result.loss - loss).abs().max() <= slack
    # Errors of single logits differ in sign, so the gradients are closer than the bound.
    got = result.grad_query * weights[:, None]
    assert (got - grad_query).norm() <= 0.2 * slack * grad_query.norm()
    got = cpu.infonce_grad_negatives(
        weights,
        query,
        negatives,
        result.lse,
        temperature,
        normalize=True,
        normalize_negatives=True,
        **options,
    )
    assert (got - grad_negatives).norm() <= 0.5 * slack * grad_negatives.norm()
    if not exclude_period:
        low, high = rank_bounds(query, positive, negatives, 2**-7, True, True)
        assert bool(((low <= result.rank) & (result.rank <= high)).all())


@pytest.mark.parametrize(
    ("instructions", "rows", "changes"),
    [
        ("", 40, {}),  # a CPU without instructions for bfloat16
        ("AMX", 10, {}),  # a small problem
        ("AMX", 40, {"normalize": False}),  # logits without a bound
        ("AMX", 40, {"temperature": 0.01}),
        ("AMX", 40, {"dot_dtype": torch.float16}),
    ],
)
def test_float32_takes_the_place_of_bfloat16(
    instructions: str, rows: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "cpu_bf16", lambda: instructions)
    inputs = features(0, rows, 20), features(1, rows, 20), features(2, 4000, 20)
    options = {"temperature": 0.2, "dot_dtype": torch.bfloat16} | changes
    result = forward(*inputs, **options)
    expected = forward(*inputs, **options | {"dot_dtype": torch.float32})
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_inputs_of_small_problems_multiply_in_float32(dtype: torch.dtype) -> None:
    query, negatives = features(0, 4, 8).to(dtype), features(1, 9, 8).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert cpu_products.operand_dtype(dtype, True, query, negatives) == expected


def test_a_nearly_perfect_match_keeps_the_digits_of_its_small_loss() -> None:
    # loss about 1e-9: a log-sum-exp minus the positive logit would return 0 in float32.
    query = torch.tensor([[1.0, 0.0]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    result = forward(query, query, negatives, 1 / 20)
    expected = info_nce_oracle(query, query, negatives, 1 / 20)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)


def test_zero_vectors_and_tiny_vectors_follow_normalize() -> None:
    # Below a norm of 1e-12, torch.nn.functional.normalize divides by 1e-12, and the gradient has no
    # radial part.
    query = torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [1.0, 2.0]])
    positive, negatives = features(0, 3, 2), features(1, 4, 2)
    result = forward(query, positive, negatives, 0.5)
    wide = query.double().requires_grad_()
    scores = (
        F.normalize(wide, eps=1e-12)
        @ torch.cat([F.normalize(positive), F.normalize(negatives)]).double().T
    )
    logits = torch.cat([scores.diagonal()[:, None], scores[:, 3:]], 1) / 0.5
    expected = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.grad_query.double(), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.005, 0.2])
@pytest.mark.parametrize("where", ["query", "positive", "negatives"])
def test_nan_in_gives_nan_out(where: str, temperature: float) -> None:
    inputs = {
        "query": features(0, 3, 4),
        "positive": features(1, 3, 4),
        "negatives": features(2, 5, 4),
    }
    inputs[where][1, 2] = math.nan
    result = forward(**inputs, temperature=temperature)
    touched = torch.tensor([True] * 3 if where == "negatives" else [False, True, False])
    assert torch.equal(result.loss.isnan(), touched)
    assert torch.equal(result.grad_query.isnan().any(1), touched)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_repeated_runs_are_bit_equal(temperature: float) -> None:
    query, positive, negatives = features(0, 300, 32), features(1, 300, 32), features(2, 9001, 32)
    first, second = (forward(query, positive, negatives, temperature) for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


# --- EMA and queue ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_views_of_features(dtype: torch.dtype) -> None:
    """The sign of the tensor is a flag beside the memory, which the compiled sweep reads."""
    plain = [features(seed, size, 64).to(dtype) for seed, size in enumerate((70, 70, 3000))]
    found = []
    for tensors in (plain, [torch._neg_view(-x) for x in plain]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        loss, rank = ops.info_nce(*leaves, return_rank=True)
        found.append([loss.detach(), rank, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_ema_matches_float64_for_every_dtype_and_stride() -> None:
    shapes = [(1,), (7, 3), (64, 3, 7, 7)]
    targets = [features(i, *s) for i, s in enumerate(shapes)]
    targets += [
        features(3, 5, 4).t(),
        features(4, 8, 8)[::2],
        features(5, 4, 6).to(memory_format=torch.contiguous_format),
    ]
    targets += [features(6, 33).bfloat16(), features(7, 33).half(), features(8, 9).double()]
    sources = [features(10 + i, *t.shape).to(t.dtype) for i, t in enumerate(targets)]
    sources[3] = sources[3].bfloat16()  # mixed: a bfloat16 source of a float32 average
    wanted = [0.99 * t.double() + 0.01 * s.double() for t, s in zip(targets, sources)]
    cpu_memory.ema_update_(targets, sources, 0.99)
    for target, want in zip(targets, wanted):
        # One rounding to the dtype of the target (half a unit in the last place), a few in float32.
        # Averaging in bfloat16 would round several times.
        low = target.dtype in (torch.bfloat16, torch.float16)
        tolerance = 0.51 * torch.finfo(target.dtype).eps if low else 4 * EPS
        torch.testing.assert_close(target.double(), want, rtol=tolerance, atol=EPS)


def test_ema_copies_integers_and_updates_tied_tensors_once() -> None:
    weight = torch.ones(3)
    count = torch.tensor(4)
    cpu_memory.ema_update_(
        [weight, count, weight], [torch.zeros(3), torch.tensor(9), torch.zeros(3)], 0.5
    )
    assert torch.equal(weight, torch.full((3,), 0.5))
    assert int(count) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_through_weights_averaged_since_is_an_error(dtype: torch.dtype) -> None:
    targets, sources = [features(0, 5).to(dtype)], [features(1, 5).to(dtype)]
    for _ in range(2):  # the second call takes the compiled loop
        x = torch.ones(5, dtype=dtype, requires_grad=True)
        product = (x * targets[0]).sum()
        ops.ema_update_(targets, sources, 0.9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_ema_of_complex_weights() -> None:
    target, source = (torch.complex(features(i, 5), features(i + 2, 5)) for i in range(2))
    want = 0.9 * target + 0.1 * source
    ops.ema_update_([target], [source], 0.9)
    torch.testing.assert_close(target, want)
    with pytest.raises(TypeError, match="both complex"):
        ops.ema_update_([target], [source.real], 0.9)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_ema_of_weights_of_8_bits_rounds_once(dtype: torch.dtype) -> None:
    target, source = (features(i, 200).to(dtype) for i in range(2))
    want = (0.9 * target.double() + 0.1 * source.double()).float().to(dtype)
    mixed = target.float()
    ops.ema_update_([target, mixed], [source, source], 0.9)
    assert torch.equal(target.float(), want.float())
    assert torch.equal(mixed.to(dtype).float(), want.float())


def test_ema_of_weights_in_channels_last_and_tied_ones() -> None:
    weight = features(0, 5, 4, 3, 3).to(memory_format=torch.channels_last)
    source = features(1, 5, 4, 3, 3)  # NCHW: paired by index, not by place in memory
    want = 0.9 * weight + 0.1 * source
    cpu_memory.ema_update_([weight, weight], [source, source], 0.9)
    torch.testing.assert_close(weight, want, rtol=4 * EPS, atol=EPS)


def test_ema_takes_its_momentum_from_a_tensor() -> None:
    by_float, by_tensor = [features(0, 5), features(1, 5)], [features(0, 5), features(1, 5)]
    sources = [features(2, 5), features(3, 5)]
    cpu_memory.ema_update_(by_float, sources, 0.5)
    cpu_memory.ema_update_(by_tensor, sources, torch.tensor(0.5))
    for a, b in zip(by_float, by_tensor):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 17),
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    start=st.integers(0, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_queue_holds_the_last_keys_after_any_wrap_around(
    size: int, batches: list[int], start: int, dtype: torch.dtype
) -> None:
    """Compares with a list written key by key. Batches may exceed the queue."""
    queue, pointer = torch.zeros(size, 3, dtype=dtype), torch.tensor([start % size])
    rows = list(queue.clone())
    at = start % size
    for i, count in enumerate(batches):
        keys = features(i, count, 3)
        cpu_memory.enqueue_(queue, pointer, keys, normalize=True)
        for key in keys:
            rows[at] = (key / key.norm()).to(dtype)
            at = (at + 1) % size
    assert int(pointer) == at
    # The norm may be summed in another order, which changes a result by one rounding of its dtype.
    torch.testing.assert_close(queue, torch.stack(rows), rtol=torch.finfo(dtype).eps, atol=EPS)


def test_the_eager_formulas_agree() -> None:
    query, positive, negatives = (
        features(0, 9, 4),
        features(1, 9, 4),
        F.normalize(features(2, 12, 4)),
    )
    loss = eager_formulas.info_nce(query, positive, negatives, 0.2)
    expected = info_nce_oracle(query, positive, negatives, 0.2).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    ours, theirs = [features(3, 4)], [features(3, 4)]
    cpu_memory.ema_update_(ours, [query[0]], 0.9)
    eager_formulas.ema_update_(theirs, [query[0]], 0.9)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    queues = [torch.zeros(18, 4), torch.zeros(18, 4)]
    pointers = [torch.tensor([9]), torch.tensor([9])]
    cpu_memory.enqueue_(queues[0], pointers[0], query, normalize=True)
    eager_formulas.enqueue_(queues[1], pointers[1], query)
    torch.testing.assert_close(queues[0], queues[1])
    assert torch.equal(pointers[0], pointers[1])
