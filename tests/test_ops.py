"""The public ops: precision against eager PyTorch, autograd, autocast and documented promises."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mocofast_bench import eager_formulas
from mocofast_kernels import cpu, cpu_memory
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mocofast import ops
from mocofast.ops import backend
from tests.oracle import info_nce_oracle

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- values and gradients ---


def eager(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float, normalize: bool
) -> Tensor:
    """Losses (N,) by the textbook formula in the inputs' dtype, with cross entropy in float32."""
    if normalize:
        query, positive, negatives = (F.normalize(x, dim=1) for x in (query, positive, negatives))
    logits = (
        torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.t()], 1) / temperature
    )
    return F.cross_entropy(
        logits.float(), torch.zeros(len(logits), dtype=torch.long), reduction="none"
    )


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 33),
    size=st.integers(1, 67),
    dim=st.integers(1, 33),
    temperature=st.floats(0.005, 1.0),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalize=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_errors_are_no_larger_than_those_of_eager_pytorch(
    count: int,
    size: int,
    dim: int,
    temperature: float,
    dtype: torch.dtype,
    reduction: str,
    normalize: bool,
    transposed: bool,
    seed: int,
) -> None:
    """Loss and all gradients against float64, beside the eager formula in the same dtype."""
    spread = 1.0 if normalize else dim**-0.5
    base = [
        features(seed + i, *s).mul(spread).to(dtype)
        for i, s in enumerate([(count, dim)] * 2 + [(size, dim)])
    ]
    if transposed:
        base = [x.t().contiguous().t() for x in base]
    weights = (
        features(seed + 3, count)
        if reduction == "none"
        else torch.ones(count) / (count if reduction == "mean" else 1)
    )
    losses, gradients = [], []
    for name in ("float64", "eager", "ours"):
        inputs = [(x.double() if name == "float64" else x.detach()).requires_grad_() for x in base]
        if name == "ours":
            loss = ops.info_nce(
                *inputs, temperature=temperature, reduction=reduction, normalize=normalize
            )
            total = (loss * weights).sum() if reduction == "none" else loss
            assert loss.dtype == torch.float32
        else:
            rows = (
                info_nce_oracle(*inputs, temperature, normalize, normalize)
                if name == "float64"
                else eager(*inputs, temperature, normalize)
            )
            total = (rows * weights).sum()
        grads = torch.autograd.grad(total, inputs)
        assert name == "float64" or [g.dtype for g in grads] == [dtype] * 3
        losses.append(float(total.detach()))
        gradients.append(torch.cat([g.double().flatten() for g in grads]))
    # Slack: a gradient entry is at most about 1/T per unit of |x|, and norms of a few coordinates
    # may be small. Ours and eager's are rounded once to the dtype and once in every product.
    # Eager's error may be smaller by luck.
    exact, theirs, ours = gradients
    size_of = float(exact.abs().max()) + 1 / temperature * float(weights.abs().max())
    slack = 4 * EPS * max(1.0, 1 / temperature) * size_of + torch.finfo(dtype).eps * float(
        exact.abs().max()
    )
    assert float((ours - exact).abs().max()) <= float((theirs - exact).abs().max()) + slack
    slack = 8 * EPS * max(1.0, 1 / temperature) * (1 + float(weights.abs().sum()))
    assert abs(losses[2] - losses[0]) <= abs(losses[1] - losses[0]) + slack


def test_reduction_none_has_the_gradient_of_any_incoming_gradient() -> None:
    query, positive, negatives = (
        features(i, n, 5).requires_grad_() for i, n in enumerate((7, 7, 11))
    )
    incoming = features(3, 7)
    loss = ops.info_nce(query, positive, negatives, temperature=0.3, reduction="none")
    expected = info_nce_oracle(query, positive, negatives, 0.3)
    for got, want in zip(
        torch.autograd.grad(loss, (query, positive, negatives), incoming),
        torch.autograd.grad(expected, (query, positive, negatives), incoming.double()),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("in_batch", [False, True])
def test_each_input_gets_its_gradient_alone_and_together(
    wanted: tuple[int, ...], in_batch: bool
) -> None:
    inputs: list[Any] = [features(0, 6, 3), features(1, 6, 3), features(2, 8, 3), torch.tensor(0.4)]
    if in_batch:
        wanted = tuple(i for i in wanted if i != 2) or (0,)
    for i in wanted:
        inputs[i].requires_grad_()
    query, positive, negatives, temperature = inputs
    if in_batch:
        loss = ops.info_nce(query, positive, temperature=temperature)
        expected = info_nce_oracle(query, positive, positive, temperature, exclude_period=6).mean()
    else:
        loss = ops.info_nce(query, positive, negatives, temperature=temperature)
        expected = info_nce_oracle(query, positive, negatives, temperature).mean()
    leaves = [inputs[i] for i in wanted]
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_expanded_inputs_get_the_sum_of_their_gradients() -> None:
    row, positive, negatives = (
        features(0, 1, 4).requires_grad_(),
        features(1, 5, 4),
        features(2, 6, 4),
    )
    loss = ops.info_nce(row.expand(5, 4), positive, negatives)
    expected = info_nce_oracle(row.expand(5, 4), positive, negatives, 0.1).mean()
    (got,), (want,) = torch.autograd.grad(loss, row), torch.autograd.grad(expected, row)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_unit_negatives_give_the_same_with_and_without_their_normalisation() -> None:
    query, positive, negatives = (
        features(0, 4, 8),
        features(1, 4, 8),
        F.normalize(features(2, 9, 8)),
    )
    plain = ops.info_nce(query, positive, negatives)
    torch.testing.assert_close(
        ops.info_nce(query, positive, negatives, negatives_normalized=True), plain
    )


def test_rank_counts_the_negatives_above_the_positive() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positive = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    negatives = torch.tensor([[1.0, 0.1], [1.0, 0.2], [-1.0, 0.0]])
    _, rank = ops.info_nce(query, positive, negatives, return_rank=True)
    assert rank.tolist() == [2, 0]
    assert not rank.is_floating_point()
    # A loss with a gradient still returns a rank without a gradient.
    loss, rank = ops.info_nce(query.requires_grad_(), positive, return_rank=True)
    assert loss.requires_grad
    assert not rank.requires_grad
    assert rank.tolist() == [0, 0]


def test_nothing_is_kept_for_backward_without_gradients() -> None:
    query = features(0, 3, 4).requires_grad_()
    with torch.no_grad():
        assert not ops.info_nce(query, features(1, 3, 4)).requires_grad
    assert not ops.info_nce(query.detach(), features(1, 3, 4)).requires_grad


def test_the_queue_may_be_overwritten_before_backward() -> None:
    query, positive, queue = (
        features(0, 4, 6).requires_grad_(),
        features(1, 4, 6),
        F.normalize(features(2, 8, 6)),
    )
    expected = torch.autograd.grad(ops.info_nce(query, positive, queue), query)[0]
    loss = ops.info_nce(query, positive, queue)
    ops.enqueue_(queue, torch.tensor([0]), features(3, 8, 6))
    loss.backward()
    assert torch.equal(query.grad, expected)


def test_negatives_that_need_a_gradient_may_not_be_overwritten_before_backward() -> None:
    query, negatives = features(0, 4, 6), features(2, 8, 6).requires_grad_()
    loss = ops.info_nce(query, query, negatives)
    with torch.no_grad():
        negatives.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction: str) -> None:
    query = features(0, 4, 6).requires_grad_()
    loss = ops.info_nce(query, features(1, 4, 6), features(2, 8, 6), reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    # A silent zero would drop the term of a gradient penalty.
    with pytest.raises(RuntimeError, match="info_nce has no second derivative"):
        (loss + grad.square().sum()).backward()


def test_a_shared_weight_collects_all_of_its_gradients() -> None:
    weight = features(0, 5, 3).requires_grad_()
    x, y = features(1, 7, 5), features(2, 7, 5)
    for loss in (
        ops.info_nce(x @ weight, y @ weight),
        info_nce_oracle(x @ weight, y @ weight, y @ weight, 0.1, exclude_period=7).mean(),
    ):
        loss.backward()
    first = torch.autograd.grad(ops.info_nce(x @ weight, y @ weight), weight)[0]
    torch.testing.assert_close(weight.grad, 2 * first, rtol=1e-4, atol=1e-5)


# --- autocast, dispatch, synchronisation ---


class Recorder:
    """The CPU kernels, with a record of the options of every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def infonce_forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append(options)
        return cpu.infonce_forward(*arguments, **options)

    infonce_grad_negatives = staticmethod(cpu.infonce_grad_negatives)
    enqueue_ = staticmethod(cpu_memory.enqueue_)
    ema_update_ = staticmethod(cpu_memory.ema_update_)


@pytest.mark.parametrize(
    ("dtypes", "context", "expected"),
    [
        ((torch.float32,) * 3, None, torch.float32),
        ((torch.bfloat16,) * 3, None, torch.bfloat16),
        ((torch.bfloat16, torch.bfloat16, torch.float16), None, torch.float32),
        ((torch.float16, torch.float16, torch.float32), None, torch.float32),
        ((torch.float32,) * 3, torch.bfloat16, torch.bfloat16),
    ],
)
def test_products_run_in_the_promoted_or_the_autocast_type(
    dtypes: tuple[torch.dtype, ...],
    context: torch.dtype | None,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(backend, "backend_for", lambda device_type: recorder)
    query, positive, negatives = (features(i, 4, 3).to(t) for i, t in enumerate(dtypes))
    with torch.autocast("cpu", dtype=context, enabled=context is not None):
        ops.info_nce(query, positive, negatives)
    assert recorder.calls[0]["dot_dtype"] is expected


def test_autocast_does_not_change_what_the_cpu_computes_of_a_small_problem() -> None:
    inputs = [features(i, n, 4).requires_grad_() for i, n in enumerate((3, 3, 5))]
    plain = torch.autograd.grad(ops.info_nce(*inputs), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.info_nce(*inputs)
        inside = torch.autograd.grad(loss, inputs)
    for a, b in zip(plain, inside):
        assert torch.equal(a, b)


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_no_op_waits_for_the_device() -> None:
    query, positive, negatives = (
        features(i, n, 4).requires_grad_() for i, n in enumerate((3, 3, 5))
    )
    queue, pointer = torch.zeros(7, 4), torch.tensor([6])
    with CountCalls() as mode:
        loss, _ = ops.info_nce(query, positive, negatives, temperature=0.2, return_rank=True)
        loss.backward()
        ops.enqueue_(queue, pointer, positive.detach())
        ops.ema_update_([queue], [torch.ones(7, 4)], 0.9)
    assert mode.calls["exp2_"] > 0  # the mode did see inside
    assert not {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"} & set(mode.calls)


def test_importing_ops_loads_neither_triton_nor_a_loader() -> None:
    code = (
        "import sys, mocofast.ops; "
        "bad = {'triton', 'nvidia.dali', 'torchvision', 'matplotlib'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cuda_without_triton_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        n for n in sys.modules if n.startswith("mocofast_kernels.") and n != "mocofast_kernels.cpu"
    ]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(f"{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    backend.backend_for.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is missing"):
            chosen = backend.backend_for("cuda")
        assert chosen.infonce_forward is cpu.infonce_forward
    finally:
        backend.backend_for.cache_clear()


# --- SimCLR, CLIP, EMA ---


@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nt_xent_is_simclrs_formula(count: int, reduction: str) -> None:
    z_a, z_b = features(0, count, 6).requires_grad_(), features(1, count, 6).requires_grad_()
    z = F.normalize(torch.cat([z_a, z_b]).double())
    similarity = (z @ z.T / 0.5).masked_fill(torch.eye(2 * count, dtype=torch.bool), -math.inf)
    labels = (torch.arange(2 * count) + count) % (2 * count)
    expected = F.cross_entropy(similarity, labels, reduction=reduction)
    loss = ops.nt_xent(z_a, z_b, reduction=reduction)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(loss.sum(), (z_a, z_b)), torch.autograd.grad(expected.sum(), (z_a, z_b))
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("count", [1, 11])
def test_clip_loss_is_open_clips_formula(count: int, as_tensor: bool) -> None:
    image, text = (F.normalize(features(i, count, 6)).requires_grad_() for i in range(2))
    logarithm = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    leaves = [image, text, logarithm] if as_tensor else [image, text]
    logits = logarithm.double().exp() * image.double() @ text.double().T
    labels = torch.arange(count)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = ops.clip_loss(image, text, logarithm.exp() if as_tensor else 1 / 0.07)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_averaged_model_takes_our_ema() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=ops.get_ema_multi_avg_fn(0.9)
    )
    theirs = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        averaged.update_parameters(network)
        theirs.update_parameters(network)
    for ours, want in zip(averaged.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)


def test_ema_updates_parameters_in_place_and_follows_the_loop() -> None:
    target, source = nn.Linear(7, 3), nn.Linear(7, 3)
    expected = [p.detach().clone() for p in target.parameters()]
    storage = [p.data_ptr() for p in target.parameters()]
    for _ in range(2):
        ops.ema_update_(list(target.parameters()), list(source.parameters()), 0.99)
        eager_formulas.ema_update_(expected, source.parameters(), 0.99)
    assert [p.data_ptr() for p in target.parameters()] == storage
    for parameter, want in zip(target.parameters(), expected):
        assert parameter.grad is None
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-6, atol=1e-7)
