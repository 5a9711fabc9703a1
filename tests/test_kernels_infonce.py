"""Checks the InfoNCE kernels against float64, without a GPU in Triton's interpreter.

The rule: the error is at most the error of eager PyTorch in the same type plus the slack of
`_slack`. As under autocast, eager PyTorch has operands and products in the type, and the softmax
in float32.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.functional import normalize as unit

from mocofast import ops
from mocofast.ops import backend
from tests import runs
from tests.oracle import info_nce_oracle, rank_bounds
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import configs, infonce
from mocofast_kernels.configs import forward_tile, split_count
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.infonce import infonce_forward
from mocofast_kernels.infonce_backward import infonce_grad_negatives
from mocofast_kernels.rows import narrow

# The interpreter is NumPy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def _inputs(
    N: int, K: int, C: int, dtype: torch.dtype = FP32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, positives correlated with the queries, and negatives.

    The correlation is that of a half-trained encoder.
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(N, C, generator=generator)
    positive = query + torch.randn(N, C, generator=generator)
    negatives = torch.randn(K, C, generator=generator)
    return query.to(DEVICE, dtype), positive.to(DEVICE, dtype), negatives.to(DEVICE, dtype)


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor = 0.07,
    dot_dtype: torch.dtype = FP32,
    normalize: bool = True,
    normalize_negatives: bool = True,
    exclude_period: int = 0,
    compute_grad: bool = True,
    num_splits: int | None = None,
) -> InfoNCEForward:
    return infonce_forward(
        query,
        positive,
        negatives,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        exclude_period=exclude_period,
        return_rank=True,
        compute_grad=compute_grad,
        dot_dtype=dot_dtype,
        num_splits=num_splits,
    )


def _eager(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
) -> Tensor:
    """Returns the loss by PyTorch's operations, in the type of the inputs up to the logits."""
    if normalize:
        query, positive = unit(query, dim=1), unit(positive, dim=1)
    if normalize_negatives:
        negatives = unit(negatives, dim=1)
    logits = (
        torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], dim=1).float()
        / temperature
    )
    if exclude_period:
        row, column = (
            torch.arange(len(query), device=DEVICE),
            torch.arange(len(negatives), device=DEVICE),
        )
        excluded = (row % exclude_period)[:, None] == (column % exclude_period)[None, :]
        logits = torch.cat(
            [logits[:, :1], logits[:, 1:].masked_fill(excluded, float("-inf"))], dim=1
        )
    return cross_entropy(
        logits, torch.zeros(len(query), dtype=torch.long, device=DEVICE), reduction="none"
    )


NAMES = ("query", "positive", "negatives")


def _slack(dtype: torch.dtype, length: float, temperature: float) -> float:
    """Returns eps |q||n| / T / 2 plus three float32 roundings.

    Rounding the vectors of a score moves the logit by up to eps |q||n| / T. Half of this value is
    granted, because eager PyTorch may by luck have no error on a small case.

    Unit vectors of dimension 1, which are 1 or -1, make all products exact. A loss of up to
    2 |q||n| / T still takes three float32 roundings of eps / 2: times log2 e, the difference of two
    logits, times ln 2.
    """
    largest = max(length, 1.0) / temperature
    return (
        0.5 * torch.finfo(dtype).eps * largest + 3 * torch.finfo(torch.float32).eps * largest + 1e-6
    )


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """Returns equal values with other strides."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every second column":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=2).flatten(1)[:, ::2]
    if layout == "rows apart":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]
    return x


LAYOUTS = ("contiguous", "transposed", "every second column", "rows apart")


class Problem(NamedTuple):
    """Sampled arguments of a call."""

    N: int
    K: int
    C: int
    temperature: float
    dtype: torch.dtype
    normalize: bool
    normalize_negatives: bool
    exclude_period: int
    layouts: tuple[str, str, str]
    num_splits: int | None
    seed: int


def _problems(rows: list[int]) -> st.SearchStrategy[Problem]:
    return st.builds(
        Problem,
        N=st.sampled_from(rows),
        # 1, odd, exactly a tile (64, 128), and more than two tiles, with a tail.
        K=st.sampled_from([1, 5, 64, 128, 129, 293]),
        # 1, below the smallest block (16), powers of two and others, several chunks of columns.
        C=st.sampled_from([1, 7, 16, 33, 64, 100, 130, 257, 300]),
        temperature=st.sampled_from([0.005, 0.02, 0.03, 0.07, 0.2, 1.0]),
        dtype=st.sampled_from([FP32, BF16, FP16]),
        normalize=st.booleans(),
        normalize_negatives=st.booleans(),
        exclude_period=st.sampled_from([0, 0, 1, 2, 67]),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
        num_splits=st.sampled_from([None, 1, 2, 5]),
        seed=st.integers(0, 2**20),
    )


def _check(problem: Problem) -> None:
    (
        N,
        K,
        C,
        temperature,
        dtype,
        normalize,
        normalize_negatives,
        exclude_period,
        layouts,
        num_splits,
        seed,
    ) = problem
    inputs = _inputs(N, K, C, dtype, seed)
    if normalize and not normalize_negatives:  # a queue holds unit vectors
        inputs = (*inputs[:2], unit(inputs[2].float(), dim=1).to(dtype))
    options = (normalize, normalize_negatives, exclude_period)
    incoming = torch.linspace(-1.0, 2.0, N, device=DEVICE)

    query, positive, negatives = (_laid_out(x, layout) for x, layout in zip(inputs, layouts))
    result = _forward(
        query, positive, negatives, temperature, dtype, *options, num_splits=num_splits
    )
    assert (
        result.grad_query is not None
        and result.grad_positive is not None
        and result.rank is not None
    )
    grad_negatives = infonce_grad_negatives(
        incoming,
        query,
        negatives,
        result.lse,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        exclude_period=exclude_period,
        dot_dtype=dtype,
    )
    ours = [
        result.grad_query * incoming[:, None],
        result.grad_positive * incoming[:, None],
        grad_negatives,
    ]

    exact = [x.double().requires_grad_() for x in inputs]
    loss = info_nce_oracle(*exact, temperature, *options)
    expected = torch.autograd.grad(loss, exact, incoming.double())
    eager_inputs = [x.clone().requires_grad_() for x in inputs]
    eager_loss = _eager(*eager_inputs, temperature, *options)
    eager = torch.autograd.grad(eager_loss, eager_inputs, incoming)

    norms = [float(x.double().norm(dim=1).max()) for x in inputs]
    length = (1.0 if normalize else norms[0]) * max(
        1.0 if normalize else norms[1], 1.0 if normalize_negatives else norms[2]
    )
    slack = _slack(dtype, length, temperature)
    assert (result.loss - loss).abs().max() <= (eager_loss - loss).abs().max() + slack

    low, high = rank_bounds(*inputs, torch.finfo(dtype).eps, *options)
    assert bool(((result.rank >= low) & (result.rank <= high)).all()), (low, result.rank, high)

    normalized = (normalize, normalize, normalize_negatives)
    for name, x, is_unit, mine, theirs, truth in zip(
        NAMES, inputs, normalized, ours, eager, expected
    ):
        error, baseline = (mine - truth).norm(), (theirs - truth).norm()
        # Gradients of a saturated softmax or of unit vectors of dimension 1 are rounding errors.
        # So errors are also compared with the largest possible gradient. Normalising divides
        # gradients by the vector's length. A negative's gradient is a sum over the queries.
        shortest = float(x.double().norm(dim=1).clamp_min(1e-12).min()) if is_unit else 1.0
        terms = float(incoming.abs().sum()) if name == "negatives" else 1.0
        floor = (
            _slack(torch.float32, length, temperature)
            * length
            / temperature
            * max(1.0, 1.0 / shortest)
            * terms
        )
        assert error <= baseline + slack * truth.norm() + floor, name


# 1, a prime, and more rows than a block of queries in float32 (32, 64).
@settings(max_examples=12, deadline=None)
@given(problem=_problems([1, 5, 37]))
def test_loss_rank_and_every_gradient_are_as_exact_as_eager_pytorch(problem: Problem) -> None:
    _check(problem)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(problem=_problems([1, 2, 31, 67, 131]))  # 131: more rows than any block
def test_the_same_holds_over_many_more_cases(problem: Problem) -> None:
    _check(problem)


def test_the_same_holds_beyond_every_block_of_rows_columns_and_negatives() -> None:
    _check(Problem(131, 150, 300, 0.1, BF16, True, True, 131, ("contiguous",) * 3, 2, 0))
    _check(Problem(67, 293, 100, 0.1, FP32, True, True, 67, ("contiguous",) * 3, None, 0))
    # Chunks of scores, programs that share a row (600 = 9 x 64 + 24 = 512 + 88), the longest row.
    _check(Problem(5, 150, 600, 0.1, BF16, True, False, 0, ("contiguous",) * 3, 2, 0))
    _check(Problem(5, 70, 1024, 0.1, FP16, True, True, 0, ("contiguous",) * 3, None, 0))


@pytest.mark.parametrize(
    ("C", "dtype", "layout"),
    [(1025, FP32, "transposed"), (1152, BF16, "contiguous"), (2048, FP16, "rows apart")],
)
def test_the_same_holds_for_rows_of_more_than_1024_columns(
    C: int, dtype: torch.dtype, layout: str
) -> None:
    _check(Problem(3, 70, C, 0.1, dtype, True, True, 3, (layout,) * 3, 2, 0))
    _check(Problem(3, 70, C, 0.1, dtype, False, False, 0, (layout,) * 3, None, 0))


@pytest.mark.slow
def test_a_row_may_have_8192_columns() -> None:
    _check(Problem(2, 20, 8192, 0.1, BF16, True, True, 0, ("contiguous",) * 3, None, 0))


def test_longer_rows_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(Problem(3, 20, 8193, 0.1, FP32, True, True, 3, ("contiguous",) * 3, None, 0))
    _check(Problem(2, 20, 9000, 0.1, BF16, False, False, 0, ("contiguous",) * 3, 2, 0))
    # All losses on a GPU, where the assertions of the kernels came through.
    kernels = backend._triton_backend()
    monkeypatch.setattr(backend, "backend_for", lambda _: kernels)
    query = torch.randn(3, 8193, device=DEVICE, requires_grad=True)
    key, labels = torch.randn(3, 8193, device=DEVICE), torch.arange(3, device=DEVICE) // 2
    for loss in (
        ops.info_nce(query, key),
        ops.nt_xent(query, key),
        ops.clip_loss(query, key, 0.1),
        ops.supervised_contrastive(query, labels),
    ):
        (gradient,) = torch.autograd.grad(loss, query)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


def test_offsets_of_columns_stay_within_32_bits() -> None:
    # Columns 2^21 elements apart: column 1,024 of a row starts at 2^31 elements.
    def laid_out(columns: int) -> Tensor:
        return torch.empty_strided((2, columns), (1, 2**21), device="meta")

    assert narrow(laid_out(1000)).stride() == (1, 2**21)
    assert narrow(laid_out(1025)).stride() == (1025, 1)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_half_types_take_the_blocked_path_on_gpus_without_matrix_units(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    configs.has_matrix_units.cache_clear()
    device = torch.device("cuda", 7)
    assert configs.has_matrix_units(device, BF16) == (capability >= (8, 0))
    assert configs.has_matrix_units(device, FP32)
    configs.has_matrix_units.cache_clear()
    inputs = _inputs(5, 40, 24, FP16)
    here = _forward(*inputs, 0.1, FP16)
    monkeypatch.setattr(configs, "has_matrix_units", lambda device, dtype: False)
    with mock.patch.object(infonce, "_sweep_kernel", None):  # the kernel cannot be launched
        there = _forward(*inputs, 0.1, FP16)
        grad_negatives = infonce_grad_negatives(
            torch.ones(5, device=DEVICE),
            inputs[0],
            inputs[2],
            there.lse,
            0.1,
            normalize=True,
            normalize_negatives=True,
            exclude_period=0,
            dot_dtype=FP16,
        )
    torch.testing.assert_close(there.loss, here.loss, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(there.grad_query, here.grad_query, rtol=2e-2, atol=2e-3)
    assert grad_negatives.isfinite().all()


def test_float32_products_follow_either_of_pytorch_s_settings() -> None:
    code = """
import torch
from mocofast_kernels.rows import precision_of
def check(expected):
    cpu = torch.device("cpu")
    assert precision_of(torch.float32, cpu) == expected
    assert precision_of(torch.bfloat16, cpu) == "ieee"
check("ieee")
torch.set_float32_matmul_precision("high"); check("tf32")
torch.set_float32_matmul_precision("highest"); check("ieee")
torch.backends.cuda.matmul.fp32_precision = "tf32"; check("tf32")
torch.backends.cuda.matmul.fp32_precision = "ieee"; check("ieee")
torch.backends.cuda.matmul.fp32_precision = "none"; check("ieee")
torch.backends.fp32_precision = "tf32"; check("tf32")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=runs.environment())


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("online", [False, True])
def test_typical_errors_are_at_most_a_tenth_above_eager(dtype: torch.dtype, online: bool) -> None:
    # 61 x 389 logits of 96 products: too many for an error of either side to be luck.
    inputs = _inputs(61, 389, 96, dtype)
    temperature = 0.1
    given_temperature = torch.tensor(temperature, device=DEVICE) if online else temperature
    result = _forward(*inputs, given_temperature, dtype)
    assert result.grad_query is not None
    exact = [x.double().requires_grad_() for x in inputs]
    loss = info_nce_oracle(*exact, temperature)
    (expected,) = torch.autograd.grad(loss.sum(), exact[:1])
    eager_inputs = [x.clone().requires_grad_() for x in inputs]
    eager_loss = _eager(*eager_inputs, temperature, True, True, 0)
    (eager,) = torch.autograd.grad(eager_loss.sum(), eager_inputs[:1])
    assert (result.loss - loss).norm() <= 1.1 * (eager_loss - loss).norm()
    assert (result.grad_query - expected).norm() <= 1.1 * (eager - expected).norm()


def test_gradient_by_the_inverse_temperature_is_exact() -> None:
    inputs = _inputs(11, 201, 48)
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True, device=DEVICE)
    rows = [
        torch.autograd.grad(row, scale, retain_graph=True)[0]
        for row in info_nce_oracle(*(x.double() for x in inputs), 1 / scale)
    ]
    result = _forward(*inputs)
    assert result.grad_scale is not None
    # Differences of scores in [-1, 1], exact to a few float32 roundings.
    torch.testing.assert_close(result.grad_scale.double(), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_lse_is_the_logsumexp_of_all_logits() -> None:
    query, positive, negatives = _inputs(11, 201, 48)
    scores = torch.cat(
        [(unit(query) * unit(positive)).sum(1, keepdim=True), unit(query) @ unit(negatives).T],
        dim=1,
    )
    expected = torch.logsumexp(scores.double() / 0.07, dim=1)
    torch.testing.assert_close(
        _forward(query, positive, negatives).lse.double(), expected, rtol=1e-6, atol=1e-5
    )


def test_a_temperature_tensor_gives_what_the_number_gives() -> None:
    inputs = _inputs(11, 201, 48)
    by_number = _forward(*inputs, 0.2)
    for dtype in (FP32, torch.float64):
        by_tensor = _forward(*inputs, torch.tensor(0.2, dtype=dtype, device=DEVICE))
        torch.testing.assert_close(by_tensor.loss, by_number.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_tensor.grad_query, by_number.grad_query, rtol=1e-5, atol=1e-6)


def test_types_of_the_inputs_may_differ() -> None:
    query, positive, negatives = _inputs(11, 201, 48)
    query, positive = query.bfloat16(), positive.half()
    result = _forward(query, positive, negatives)
    # Operands are float32 here, so the rounding of the inputs is no error.
    torch.testing.assert_close(
        result.loss.double(),
        info_nce_oracle(query, positive, negatives, 0.07),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dot_dtype", [FP32, BF16, FP16])
def test_two_runs_give_equal_bits(dot_dtype: torch.dtype) -> None:
    inputs = _inputs(19, 293, 33)
    first, second = (_forward(*inputs, dot_dtype=dot_dtype) for _ in range(2))
    for one, other in zip(first, second):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("temperature", [0.07, 0.01])  # fixed shift, running maximum
def test_the_number_of_splits_changes_rounding_alone(temperature: float) -> None:
    inputs = _inputs(5, 300, 17)
    whole = _forward(*inputs, temperature, num_splits=1)
    for splits in (2, 3, 10, 1000):
        split = _forward(*inputs, temperature, num_splits=splits)
        assert whole.rank is not None and split.rank is not None
        assert torch.equal(split.rank, whole.rank)
        torch.testing.assert_close(split.loss, whole.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(split.grad_query, whole.grad_query, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_loss_and_rank_are_the_same() -> None:
    inputs = _inputs(19, 293, 33)
    with_gradients, without = _forward(*inputs), _forward(*inputs, compute_grad=False)
    assert torch.equal(without.loss, with_gradients.loss)
    assert without.rank is not None and with_gradients.rank is not None
    assert torch.equal(without.rank, with_gradients.rank)
    assert (
        without.grad_query is None and without.grad_positive is None and without.grad_scale is None
    )


def test_a_row_without_negatives_has_no_loss_and_no_gradient() -> None:
    query, positive, _ = _inputs(1, 1, 8)
    for temperature in (0.07, 0.01):
        result = _forward(query, positive, positive, temperature, exclude_period=1)
        assert result.grad_query is not None and result.grad_scale is not None
        assert result.loss.item() == 0.0
        assert not result.grad_query.any() and not result.grad_scale.any()


@pytest.mark.parametrize("dot_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_a_nan_gives_nan_where_it_counts_and_nowhere_else(
    dot_dtype: torch.dtype, temperature: float
) -> None:
    # Row 3 of the negatives is in a full tile, row 140 in the tail.
    for name, row in (("query", 2), ("positive", 2), ("negatives", 3), ("negatives", 140)):
        inputs = dict(zip(("query", "positive", "negatives"), _inputs(5, 141, 9)))
        inputs[name][row, 4] = torch.nan
        result = _forward(**inputs, temperature=temperature, dot_dtype=dot_dtype)
        affected = (
            torch.ones(5, dtype=torch.bool) if name == "negatives" else torch.arange(5) == row
        )
        assert result.grad_query is not None
        assert torch.equal(result.loss.isnan().cpu(), affected), name
        assert torch.equal(result.grad_query.isnan().all(dim=1).cpu(), affected), name


@pytest.mark.usefixtures("tf32")
def test_tf32_operands_are_rounded_and_keep_nan() -> None:
    inputs = _inputs(19, 293, 33)
    result = _forward(*inputs, dot_dtype=FP32)
    exact = info_nce_oracle(*inputs, 0.07)
    error = (result.loss - exact).abs().max()
    # tf32 has 10 bits of fraction. Rounding both vectors moves a logit by at most 2^-11 * 2 / T.
    # The error of float32 would stay below 1e-5.
    assert 1e-5 < error < 2**-10 / 0.07
    # The NaN that GPUs write. Adding half a unit to round would carry out of the NaN's bits.
    inputs[2][7, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(FP32)
    assert bool(_forward(*inputs, dot_dtype=FP32).loss.isnan().all())


def test_an_easy_positive_keeps_the_digits_of_its_tiny_loss() -> None:
    # Negatives opposite the query: the loss is K e^(-2 / 0.05) = 1e-15, lost in 1 + x.
    query = torch.eye(3, 8, device=DEVICE)
    negatives = -query.repeat(41, 1)[:, :8]
    result = _forward(query, query, negatives, 0.05)
    expected = info_nce_oracle(query, query, negatives, 0.05)
    assert bool((expected < 1e-6).all())
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=0)


def test_float16_keeps_small_probabilities() -> None:
    # A single negative takes nearly all of the softmax. 299 further negatives of probability 2^-20
    # pull along the same axis. Without room above 1, float16 would hold 2^-20 to 4 bits.
    temperature = 0.01
    score = 20 * torch.log(torch.tensor(2.0)).item() * temperature
    query = torch.zeros(1, 4, device=DEVICE)
    query[0, 0] = 1.0
    other = torch.tensor([1 - score * 1.02, 0.0, 0.0, 0.0], device=DEVICE)
    other[1] = (1 - other[0] ** 2).sqrt()
    negatives = torch.cat([query, other.repeat(299, 1)])
    positive = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=DEVICE)
    inputs = [x.half() for x in (query, positive, negatives)]
    exact = [x.double().requires_grad_() for x in inputs]
    (expected,) = torch.autograd.grad(
        info_nce_oracle(*exact, temperature, False, False).sum(), exact[:1]
    )
    result = _forward(*inputs, temperature, FP16, False, False)
    assert result.grad_query is not None
    torch.testing.assert_close(result.grad_query[0, 1].double(), expected[0, 1], rtol=2e-3, atol=0)


def test_float16_gradients_of_negatives_survive_any_scale_of_the_incoming_gradient() -> None:
    query, positive, negatives = _inputs(11, 201, 48, FP16)
    lse = _forward(query, positive, negatives, 0.07, FP16).lse

    def grad(scale: float) -> Tensor:
        incoming = torch.full((11,), scale, device=DEVICE)
        return infonce_grad_negatives(
            incoming,
            query,
            negatives,
            lse,
            0.07,
            normalize=True,
            normalize_negatives=True,
            exclude_period=0,
            dot_dtype=FP16,
        )

    once = grad(1.0)
    for scale in (1e-8, 65536.0):  # a mean over many rows; a gradient scaler's factor
        torch.testing.assert_close(grad(scale) / scale, once, rtol=1e-3, atol=1e-6)
    assert not grad(0.0).any()


def test_offsets_that_would_overflow_32_bits_are_avoided_by_a_copy() -> None:
    wide = torch.empty_strided((3, 4), (2**23, 1), device="meta")
    assert narrow(wide).is_contiguous()
    usual = torch.empty_strided((3, 4), (2**20, 1), device="meta")
    assert narrow(usual) is usual


def test_splits_fill_the_gpu_and_every_split_has_tiles() -> None:
    # An H200 runs 264 programs at a time; 256 queries are 4 blocks, 65536 negatives 512 tiles.
    assert 4 * split_count(4, 512, 264) > 0.9 * 264
    assert split_count(264, 512, 264) == 1
    assert split_count(1, 1, 264) == 1
    assert forward_tile(128, "16bit", True, True, False).stay == 64


def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    """Takes 600 rows at the largest distance without a copy: 2.5e9 elements, 600 pages touched."""
    distance = 2**22 - 8
    buffer = torch.empty(600 * distance, dtype=BF16, device=DEVICE)
    negatives = buffer.as_strided((600, 16), (distance, 1))
    assert narrow(negatives) is negatives
    query, positive, packed = _inputs(5, 600, 16, BF16)
    packed = unit(packed.float()).to(BF16)
    negatives.copy_(packed)
    far, near = (
        _forward(query, positive, x, 0.07, BF16, True, False, num_splits=3)
        for x in (negatives, packed)
    )
    assert torch.equal(far.loss, near.loss)
    assert (
        far.grad_query is not None
        and near.grad_query is not None
        and torch.equal(far.grad_query, near.grad_query)
    )


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_of_negatives() -> None:
    K, C = 2**25 + 3, 64  # the last rows lie beyond 2^31 elements
    negatives = torch.zeros(K, C, dtype=BF16, device="cuda")
    query, positive, some = _inputs(5, 6, C, BF16)
    negatives[-6:] = unit(some.float()).to(BF16)
    result = _forward(query, positive, negatives, 0.07, BF16, True, False)
    few = info_nce_oracle(query, positive, negatives[-6:], 0.07, True, False)
    scores = (unit(query.double()) * unit(positive.double())).sum(1)
    # All further negatives have the score 0.
    expected = (few.exp() + (K - 6) * (-scores / 0.07).exp()).log()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_sweep() -> None:
    inputs = _inputs(67, 293, 33, BF16)
    expected = _forward(*inputs, dot_dtype=BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _forward(*inputs, dot_dtype=BF16)
    graph.replay()
    assert torch.equal(captured.loss, expected.loss)
    inputs[0].copy_(inputs[1])
    graph.replay()
    assert torch.equal(captured.loss, _forward(*inputs, dot_dtype=BF16).loss)
