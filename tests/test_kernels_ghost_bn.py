"""Checks ghost BatchNorm, kernels and op, against a float64 BatchNorm for every split.

Without a GPU the kernels run in Triton's interpreter.

The rule: the error is at most the error of PyTorch's BatchNorm, called for every split in the
same type, plus a stated slack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import runs
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import ghost_bn
from mocofast_kernels.cpu_ghost_bn import normalises

from mocofast.ops import backend, batch_norm
from mocofast.ops.batch_norm import ghost_batch_norm

# The interpreter is NumPy, which warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)

TRITON, C = backend.backend_for("cuda"), backend.backend_for("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MOMENTUM, EPS = 0.1, 1e-5
# Largest relative rounding error of a type. Statistics and sums are float32.
ROUNDING = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}


@pytest.fixture(autouse=True, params=["triton"])
def _kernels_on_this_device(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    if request.param == "C":
        if C.ghost_bn_forward is None or DEVICE != "cpu":
            pytest.skip("not on a CPU with AVX-512, or not compiled")
    else:
        monkeypatch.setattr(backend, "backend_for", lambda device_type: TRITON)
        monkeypatch.setattr(backend, "BATCH_NORM_DEVICES", (DEVICE,))
    monkeypatch.setattr(
        batch_norm, "pytorch_batch_norm", None
    )  # whatever should run on the kernels must not come here
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Tests of the values run on both kernels.
both_kernels = pytest.mark.parametrize("_kernels_on_this_device", ["triton", "C"], indirect=True)


class Case(NamedTuple):
    """Tensors of one call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        """Returns the tensors with gradients: x, weight, bias, and the residual if present."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(None if t is None else t.detach().to(dtype) for t in self))


def case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = FP32,
    residual: bool = False,
    mean: float = 2.0,
    std: float = 3.0,
) -> Case:
    """Returns random activations, with the same mean and deviation for all channels and splits."""
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype)
    C = shape[1]
    tensors = (
        x,
        torch.randn(shape).to(dtype) if residual else None,
        torch.randn(C),
        torch.randn(C),
        torch.randn(C),
        torch.rand(C) + 0.5,
        torch.randn(shape).to(dtype),
    )
    placed = [None if t is None else t.to(DEVICE) for t in tensors]
    return Case(
        *(
            t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
            for t in placed
        )
    )


def per_split(c: Case, splits: int, relu: bool) -> list[Tensor]:
    """Calls PyTorch's BatchNorm for every split.

    Returns output, running mean, running variance, gradients of the leaves.
    """
    c = Case(*(None if t is None else t.detach().clone() for t in c))
    for leaf in c.leaves():
        leaf.requires_grad_()
    outputs, means, variances = [], [], []
    for split in range(splits):
        means.append(c.running_mean.clone())
        variances.append(c.running_var.clone())
        outputs.append(
            F.batch_norm(
                c.x[split::splits], means[-1], variances[-1], c.weight, c.bias, True, MOMENTUM, EPS
            )
        )
    y = torch.stack(outputs, dim=1).flatten(
        0, 1
    )  # sample n is number n // splits of split n % splits
    if c.residual is not None:
        y = y + c.residual
    if relu:
        y = y.relu()
    grads = torch.autograd.grad(y, c.leaves(), c.grad)
    return [y.detach(), torch.stack(means).mean(0), torch.stack(variances).mean(0), *grads]


def ours(c: Case, splits: int, relu: bool) -> list[Tensor]:
    """Returns the results of the op, in the order of `per_split`."""
    mean, variance = c.running_mean.clone(), c.running_var.clone()
    leaves = [leaf.detach().requires_grad_() for leaf in c.leaves()]
    x, weight, bias, *residual = leaves
    y = ghost_batch_norm(
        x,
        weight,
        bias,
        mean,
        variance,
        splits,
        MOMENTUM,
        EPS,
        relu,
        residual[0] if residual else None,
    )
    return [y.detach(), mean, variance, *torch.autograd.grad(y, leaves, c.grad)]


NAMES = ("output", "running mean", "running variance", "x", "weight", "bias", "residual")


def assert_as_good_as_eager(c: Case, splits: int, relu: bool) -> None:
    """Asserts an error of at most eager's error plus 16 float32 roundings of the largest value.

    The largest value counts as at least 1, for sums that cancel. Eager sums in float64 on a CPU,
    and the interpreter sums in the least precise order. Rounding to other types is not granted.
    """
    exact = per_split(c.to(torch.float64), splits, relu)
    for name, got, eager, want in zip(
        NAMES, ours(c, splits, relu), per_split(c, splits, relu), exact
    ):
        error, eager_error = (float((t.double() - want).abs().max()) for t in (got, eager))
        slack = 16 * ROUNDING[FP32] * max(1.0, float(want.abs().max()))
        assert error <= eager_error + slack, (
            f"{name}: {error:.2e}, eager {eager_error:.2e}, slack {slack:.2e}"
        )


SHAPES = [
    ((8, 64, 3, 3), 4),  # a full block of columns
    ((6, 13, 5, 7), 3),  # odd and prime: narrow loads, masked columns
    ((4, 70, 1, 3), 2),  # a block of columns and a bit
    ((2, 1, 1, 1), 1),  # a single channel, a single pixel, a single split
    ((5, 3, 2, 1), 5),  # a single sample in a split
    ((48, 8, 13, 11), 2),  # several chunks of rows, the last chunk cut
    ((6, 168, 7, 5), 3),  # in C several tiles of an image, the last cut, and parts of 64 channels
    ((4, 2080, 2, 1), 2),  # in C tiles of a pixel
]


@both_kernels
@pytest.mark.parametrize(
    ("relu", "residual"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(("shape", "splits"), SHAPES)
def test_float32_is_as_good_as_one_batchnorm_per_split(
    shape: tuple[int, int, int, int], splits: int, relu: bool, residual: bool
) -> None:
    assert_as_good_as_eager(case(shape, FP32, residual), splits, relu)


@both_kernels
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_16_bit_types_round_once(dtype: torch.dtype, residual: bool) -> None:
    if backend.backend_for("cpu") is not TRITON and not normalises(dtype):
        pytest.skip("PyTorch computes")
    c = case((6, 24, 5, 7), dtype, residual)
    assert_as_good_as_eager(c, 3, relu=True)
    # Stricter than "as good as eager": only the rounding of the output is left.
    exact = per_split(c.to(torch.float64), 3, True)[0]
    got = ours(c, 3, True)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=1e-5)


@both_kernels
@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_mean_100000_times_the_deviation_keeps_the_variance(mean: float) -> None:
    # Float32 has steps of 6e-5 there. The float64 oracle sees the same rounded inputs.
    assert_as_good_as_eager(case((16, 7, 9, 5), mean=mean, std=1e-2), 2, relu=False)


@both_kernels
def test_an_outlier_in_the_first_row_costs_no_precision() -> None:
    """The kernel sums differences from the mean of the first rows, which have an outlier here."""
    c = case((16, 7, 9, 5), mean=1000.0, std=1e-2)
    c.x[:2, :, 0, 0] = 0
    variance = per_split(c.to(torch.float64), 2, False)[2]
    torch.testing.assert_close(ours(c, 2, False)[2].double(), variance, rtol=1e-5, atol=0)


@both_kernels
def test_a_constant_channel_has_variance_0_and_gives_the_bias() -> None:
    c = case((4, 5, 3, 7))
    c.x[:, 2] = 1234.567
    y, _, variance, grad_x, *_ = ours(c, 2, False)
    assert torch.equal(y[:, 2], c.bias[2].expand_as(y[:, 2]))
    torch.testing.assert_close(variance[2], (1 - MOMENTUM) * c.running_var[2])
    assert grad_x.isfinite().all()


@both_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_infinity_spoils_its_channel_of_its_part_and_nothing_else(bad: float) -> None:
    c = case((8, 5, 3, 3))
    c.x[5, 3, 1, 1] = bad  # split 1 of 4
    y = ours(c, 4, True)[0]
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[1::4, 3] = True
    assert torch.equal(y.isnan(), spoilt)


@both_kernels
def test_two_runs_are_bit_equal() -> None:
    c = case((24, 24, 13, 11), BF16, residual=True)
    for first, second in zip(ours(c, 2, True), ours(c, 2, True)):
        assert torch.equal(first, second)


def test_rows_that_need_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces the kernels for more than 2^31 rows onto few rows."""
    c = case((8, 13, 5, 7))
    narrow = ours(c, 2, True)
    monkeypatch.setattr(ghost_bn, "_is_wide", lambda _: True)
    ghost_bn._chunking.cache_clear()
    try:
        for got, want in zip(ours(c, 2, True), narrow):
            assert torch.equal(got, want)
    finally:
        ghost_bn._chunking.cache_clear()


def test_parameters_and_statistics_may_be_16_bit() -> None:
    c = case((8, 6, 3, 3), BF16)
    low = c._replace(
        **{name: getattr(c, name).bfloat16() for name in ("weight", "bias", "running_mean")}
    )
    got = ours(low, 2, False)
    assert [t.dtype for t in got] == [BF16, BF16, FP32, BF16, BF16, BF16]
    for ours_, want in zip(got, per_split(low.to(torch.float64), 2, False)):
        torch.testing.assert_close(
            ours_.double(), want, rtol=2**-7, atol=2**-7 * float(want.abs().max())
        )


@both_kernels
@pytest.mark.parametrize("form", ["sliced", "transposed"])
def test_other_strides_are_made_channels_last(form: str) -> None:
    c = case((4, 6, 3, 5))
    want = ours(c, 2, False)
    if form == "sliced":
        x = torch.zeros(4, 6, 3, 9, device=DEVICE)[..., 2:7].copy_(c.x)
    else:
        x = c.x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for got, expected in zip(ours(c._replace(x=x, grad=c.grad.contiguous()), 2, False), want):
        assert torch.equal(got, expected)


def test_nchw_memory_and_float64_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backend, "backend_for", lambda device_type: TRITON)
    monkeypatch.setattr(backend, "BATCH_NORM_DEVICES", (DEVICE,))
    monkeypatch.setattr(batch_norm, "_forward", None)
    c = case((6, 5, 3, 7), residual=True)
    nchw = Case(*(t.contiguous() if t is not None else None for t in c))
    for inputs in (nchw, c.to(torch.float64)):
        got, want = ours(inputs, 3, True), per_split(inputs, 3, True)
        assert got[0].is_contiguous() == inputs.x.is_contiguous()
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)


@both_kernels
def test_without_gradients_nothing_is_kept_and_the_output_is_the_same() -> None:
    c = case((6, 5, 3, 7))
    want = ours(c, 3, True)
    with torch.no_grad():
        y = ghost_batch_norm(
            c.x, c.weight, c.bias, c.running_mean, c.running_var, 3, MOMENTUM, EPS, relu=True
        )
    assert y.grad_fn is None
    assert torch.equal(y, want[0])
    assert torch.equal(c.running_mean, want[1])


@both_kernels
def test_autocast_leaves_the_type_of_the_activations() -> None:
    c = case((6, 5, 3, 7), BF16)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ours(c, 3, False)
    assert [t.dtype for t in got] == [BF16, FP32, FP32, BF16, FP32, FP32]
    for a, b in zip(got, ours(c, 3, False)):
        assert torch.equal(a, b)


@both_kernels
def test_pytorchs_default_type_plays_no_part() -> None:
    c = case((6, 37, 3, 7), FP32)
    expected, default = ours(c, 3, True), torch.get_default_dtype()
    try:
        torch.set_default_dtype(BF16)
        got = ours(c, 3, True)
    finally:
        torch.set_default_dtype(default)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@both_kernels
def test_double_backward_is_an_error() -> None:
    c = case((4, 5, 3, 3))
    x = c.x.requires_grad_()
    y = ghost_batch_norm(x, c.weight, c.bias, c.running_mean, c.running_var, 2, MOMENTUM, EPS)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), x)


def residual_as(dtype: torch.dtype, *shape: int) -> dict[str, Any]:
    return {"residual": torch.zeros(shape, dtype=dtype, device=DEVICE)}


@pytest.mark.parametrize(
    ("shape", "splits", "options", "error", "message"),
    [
        ((6, 3, 2, 2), 4, {}, ValueError, "got 6 images and 4 splits"),
        ((6, 3, 2, 2), 0, {}, ValueError, "got 6 images and 0 splits"),
        ((6, 3, 1, 1), 6, {}, ValueError, "more than one value per channel in each of 6 splits"),
        ((1, 3, 1, 1), 1, {}, ValueError, "more than one value per channel: got shape"),
        ((6, 4, 2, 2), 2, {}, ValueError, r"3 channels.* got shape \(6, 4, 2, 2\)"),
        ((6, 3, 4), 2, {}, ValueError, r"x must be \(N, C, H, W\): got shape \(6, 3, 4\)"),
        (
            (6, 3, 2, 2),
            2,
            residual_as(FP32, 6, 3, 2, 1),
            ValueError,
            r"residual must have x's shape",
        ),
        (
            (6, 3, 2, 2),
            2,
            residual_as(BF16, 6, 3, 2, 2),
            TypeError,
            "residual must have x's type torch.float32",
        ),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(
    shape: tuple[int, ...],
    splits: int,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    x, ones = torch.randn(shape, device=DEVICE), torch.ones(3, device=DEVICE)
    mean, variance = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with pytest.raises(error, match=message):
        ghost_batch_norm(x, ones, ones, mean, variance, splits, MOMENTUM, EPS, **options)
    assert torch.equal(mean, torch.zeros_like(mean)) and torch.equal(variance, ones)


@pytest.mark.parametrize(
    ("relu", "residual"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_compiled_it_equals_eager(relu: bool, residual: bool) -> None:
    c = case((6, 8, 3, 5), residual=residual)
    want = ours(c, 3, relu)
    mean, variance = c.running_mean.clone(), c.running_var.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return ghost_batch_norm(
            x,
            weight,
            bias,
            mean,
            variance,
            3,
            MOMENTUM,
            EPS,
            relu,
            residual[0] if residual else None,
        )

    leaves = [leaf.detach().requires_grad_() for leaf in c.leaves()]
    y = call(*leaves)
    assert y.is_contiguous(memory_format=torch.channels_last)
    got = [y.detach(), mean, variance, *torch.autograd.grad(y, leaves, c.grad)]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_the_custom_ops_pass_pytorchs_own_checks() -> None:
    c = case((4, 3, 2, 3), residual=True)
    x, weight, bias, residual = (leaf.requires_grad_() for leaf in c.leaves())
    torch.library.opcheck(
        batch_norm._ghost_batch_norm_op, (x, residual, weight, bias, 2, EPS, True)
    )
    torch.library.opcheck(batch_norm._ghost_batch_norm_op, (x, None, weight, bias, 2, EPS, False))
    statistics = torch.rand(3, 2, 3, device=DEVICE)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    torch.library.opcheck(
        batch_norm._backward_op, (c.grad, x, x.clone(), weight, bias, statistics, 2, True)
    )
    torch.library.opcheck(
        batch_norm._backward_op, (c.grad, x, None, weight, bias, statistics, 2, False)
    )


def test_the_kernels_compile_without_spills_for_gpus_that_are_not_here() -> None:
    """Compiles in a new process, without the interpreter.

    test_bench_machine_code has the other cases under --slow.
    """
    only = r"^ghost_bn, \(256, 64, 56, 56\), torch.bfloat16, residual, relu$"
    result = runs.compiled("mocofast_bench.inspect_code", "--json", "--only", only)
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert {report["capability"] for report in reports} == {80, 90, 100}
    assert len(reports) == 3 * 6
    assert not any(report["spills"] for report in reports)
    # With 128 threads a program, 128 registers a thread keep 4 programs on a multiprocessor.
    assert max(report["registers"] for report in reports) <= 128
