"""Convolutions in C: values against float64, what stays with PyTorch, and blocks that use them."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mocofast_kernels import cpu_convolution
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocofast.models import convolutions
from mocofast.models.convolutions import (
    CompiledConv2d,
    PixelConv2d,
    compile_convolutions,
    compiled_convolutions,
)
from mocofast.models.encoders import build_encoder
from mocofast.ops import convolution
from mocofast.ops.convolution import convolve

TYPES = [dtype for dtype in cpu_convolution.KINDS if cpu_convolution.convolves(dtype)]
AVX2 = 2  # the library's number of float32 with AVX2, which a CPU with AVX-512 has, too
# Half of a bfloat16's last bit, which is 2^-8 of the value, and rounding of float32's sums.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-4}

pytestmark = pytest.mark.skipif(not TYPES, reason="neither AVX2 nor AVX-512, or not compiled")


@pytest.fixture(params=[*TYPES, AVX2], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The type of a test, which runs once for every kind of instructions."""
    if request.param != AVX2:
        return request.param
    monkeypatch.setattr(cpu_convolution, "kind_of", lambda _: (AVX2, "AVX2"))
    return torch.float32


def drawn(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def check(
    dtype: torch.dtype,
    images: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compares result and gradients with PyTorch's in float64. Returns the three tensors."""
    x = drawn(*images, dtype=dtype).requires_grad_()
    w = drawn(outputs, images[1], *kernel, dtype=dtype, seed=1).requires_grad_()
    y = convolve(x, w, stride, padding, dilation)
    assert y is not None
    assert y.is_contiguous(memory_format=torch.channels_last)
    gradient = drawn(*y.shape, dtype=dtype, seed=2)
    y.backward(gradient)
    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, w))
    wide_y = F.conv2d(wide_x, wide_w, None, stride, padding, dilation)
    assert y.shape == wide_y.shape
    wide_y.backward(gradient.double())
    assert x.grad is not None
    assert w.grad is not None
    for name, found, expected in (
        ("result", y, wide_y),
        ("images", x.grad, wide_x.grad),
        ("weight", w.grad, wide_w.grad),
    ):
        assert expected is not None
        assert found.dtype == dtype
        # The worst element, in parts of the whole, so that a wrong edge cannot hide.
        error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
        assert error < ERROR[dtype], f"{name}: {error:.1e}"
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("channels", [(16, 16), (32, 48), (48, 80), (64, 112), (144, 32)])
def test_channels(dtype: torch.dtype, channels: tuple[int, int]) -> None:
    inputs, outputs = channels
    check(dtype, (5, inputs, 7, 6), outputs, (3, 3), padding=(1, 1))
    check(dtype, (5, inputs, 7, 6), outputs, (1, 1), stride=(2, 2))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (0, 0), (1, 1)),  # gradients of most pixels are 0
        ((1, 1), (1, 1), (2, 1), (1, 1)),  # results at the edge are 0
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (1, 1), (2, 2), (2, 2)),
        ((3, 3), (3, 2), (0, 4), (1, 2)),
        ((5, 1), (1, 2), (2, 0), (1, 1)),
        ((2, 7), (2, 1), (1, 3), (3, 1)),
        ((4, 4), (4, 4), (0, 0), (1, 1)),  # patches
    ],
)
def test_shapes(
    dtype: torch.dtype,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    for images, (height, width) in itertools.product((1, 4, 7), ((8, 8), (11, 9))):
        check(dtype, (images, 32, height, width), 32, kernel, stride, padding, dilation)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiny_images(dtype: torch.dtype, size: int, stride: int) -> None:
    """oneDNN leaves parts of these gradients uninitialised in bfloat16."""
    _, _, gradient = check(
        dtype, (32, 32, size, size), 64, (3, 3), stride=(stride, stride), padding=(1, 1)
    )
    if size == 1:  # taps beside the image
        outside = gradient.clone()
        outside[:, :, 1, 1] = 0
        assert not outside.any()


def test_images_in_chunks(dtype: torch.dtype) -> None:
    """The gradient of the weights takes some images, or some pixels of an image, at a time."""
    few = cpu_convolution.Shape(9, 16, 40, 40, 16, (3, 3), (1, 1), (1, 1), (1, 1))
    plan = cpu_convolution._weights_plan(few, dtype)
    assert plan.chunks > 1
    check(dtype, (9, 16, 40, 40), 16, (3, 3), padding=(1, 1))
    some = few._replace(height=24, width=24)
    plan = cpu_convolution._weights_plan(some, dtype)
    assert plan.chunks == 1
    assert plan.images_at_a_time < 9
    check(dtype, (9, 16, 24, 24), 16, (3, 3), padding=(1, 1))


def test_images_in_several_calls_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, list[int]] = {}

    def record(name: str) -> None:
        plan = getattr(cpu_convolution, name)

        def recorded(shape: cpu_convolution.Shape) -> cpu_convolution._Gather:
            sizes.setdefault(name, []).append(shape.images)
            result: cpu_convolution._Gather = plan(shape)
            return result

        monkeypatch.setattr(cpu_convolution, name, recorded)

    for name in ("_forward_plan", "_backward_plan"):
        record(name)
    whole = check(dtype, (7, 80, 6, 6), 144, (3, 3), padding=(1, 1))
    assert sizes == {"_forward_plan": [7], "_backward_plan": [7]}
    image = 80 * 36 * dtype.itemsize
    for limit, of_result, of_gradient in (
        (3 * image, [3, 3, 1], [2, 2, 2, 1]),
        (1, [1] * 7, [1] * 7),
    ):
        sizes.clear()
        monkeypatch.setattr(cpu_convolution, "CALL_BYTES", limit)
        found = check(dtype, (7, 80, 6, 6), 144, (3, 3), padding=(1, 1))
        assert sizes == {"_forward_plan": of_result, "_backward_plan": of_gradient}
        assert all(torch.equal(one, other) for one, other in zip(found, whole))
    sizes.clear()
    check(dtype, (7, 64, 6, 6), 64, (3, 3), padding=(1, 1))
    assert sizes == {"_forward_plan": [7], "_backward_plan": [7]}  # a panel reads images once


@pytest.mark.parametrize("outputs", [64, 144])
def test_every_number_of_threads_gives_the_same_bits(dtype: torch.dtype, outputs: int) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(check(dtype, (6, 80, 9, 9), outputs, (3, 3), padding=(1, 1)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result):
            assert torch.equal(one, other)


def test_a_smaller_team_computes_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may give fewer threads than asked for."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    calls = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def alone(work: int, argument: int, threads: int, _: int) -> None:
        calls.append(threads)
        function(work)(argument)

    monkeypatch.setattr(
        cpu_convolution, "threads_of_openmp", lambda: ctypes.cast(alone, ctypes.c_void_p)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    check(TYPES[0], (6, 80, 9, 9), 144, (3, 3), padding=(1, 1))
    assert calls == [4, 4, 4]


def test_a_plan_holds_its_tables() -> None:
    """Two threads may make the same plan at a time. The cache keeps a single plan."""
    shape = cpu_convolution.Shape(2, 16, 5, 5, 16, (3, 3), (1, 1), (1, 1), (1, 1))
    gather = ("class_taps", "class_rows", "tap", "offset", "to", "from")
    for plan, fields in (
        (cpu_convolution._forward_plan.__wrapped__(shape), gather),
        (cpu_convolution._backward_plan.__wrapped__(shape), gather),
        (
            cpu_convolution._weights_plan.__wrapped__(shape, torch.float32),
            ("bounds", "tap_links", "output", "input"),
        ),
    ):
        for field, table in zip(fields, plan.tables, strict=True):
            assert getattr(plan, field) == table.ctypes.data


def test_pytorch_computes_gradients_of_the_weights_of_large_1_x_1_convolutions(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "LARGE", 4 * 7 * 6)
    monkeypatch.setattr(cpu_convolution, "weight_gradient", None)
    check(dtype, (5, 32, 7, 6), 48, (1, 1))
    with pytest.raises(TypeError):  # the library's
        check(dtype, (4, 32, 7, 6), 48, (1, 1))


def test_expanded_and_transposed_gradients() -> None:
    x = drawn(3, 16, 4, 4).requires_grad_()
    w = drawn(16, 16, 3, 3, seed=1).requires_grad_()
    y = convolve(x, w, (1, 1), (1, 1), (1, 1))
    assert y is not None
    expected = F.conv2d(x, w, padding=1)
    for found, value in zip(
        torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w))
    ):
        torch.testing.assert_close(found, value)
    first = drawn(3, 16, 4, 4, seed=2).contiguous()  # channels first
    y = convolve(first, w, (1, 1), (1, 1), (1, 1))
    torch.testing.assert_close(y, F.conv2d(first, w, padding=1))


def test_pytorchs_default_type_and_device_play_no_part() -> None:
    x, w = drawn(2, 16, 5, 5).requires_grad_(), drawn(16, 16, 3, 3, seed=1).requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, w).sum(), w)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            y = convolve(x, w, (1, 1), (0, 0), (1, 1))
            assert y is not None
            (of_weight,) = torch.autograd.grad(y.sum(), w)
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(of_weight, expected, rtol=1e-4, atol=1e-4)


def test_negative_views() -> None:
    """The sign of the tensor is a flag beside the memory."""
    x, w = drawn(2, 16, 4, 4), drawn(16, 16, 3, 3, seed=1).requires_grad_()
    y = convolve(torch._neg_view(x), w, (1, 1), (1, 1), (1, 1))
    assert y is not None
    torch.testing.assert_close(y, F.conv2d(-x, w, padding=1))
    (found,) = torch.autograd.grad(y, w, torch._neg_view(drawn(*y.shape, seed=2)))
    expected = torch.autograd.grad(F.conv2d(x, w, padding=1), w, drawn(*y.shape, seed=2))[0]
    torch.testing.assert_close(found, expected)
    assert convolve(x, torch._neg_view(w.detach()), (1, 1), (1, 1), (1, 1)) is None


def test_a_weight_in_the_memory_of_another_parameter_stays_there() -> None:
    layers = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(3)))
    layers[1].weight = nn.Parameter(layers[0].weight.data)  # another Parameter, the same memory
    with compiled_convolutions(layers):
        kinds = [type(layer) is CompiledConv2d for layer in layers]
        with torch.no_grad():
            layers[0].weight.fill_(2)
    assert kinds == [False, False, True]
    assert bool((layers[1].weight == 2).all())


@pytest.mark.skipif(torch.bfloat16 not in TYPES, reason="no products of bfloat16 on this CPU")
@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        (3, (3, 3), ((2, 2), (1, 1), (1, 1))),
        (1, (5, 3), ((1, 2), (2, 0), (1, 2))),
        (13, (1, 4), ((3, 1), (0, 3), (2, 1))),
        (24, (1, 1), ((1, 1), (0, 0), (1, 1))),
    ],
)
def test_pixels_of_bfloat16_have_a_float32_gradient_of_the_weight_on_threads(
    channels: int, kernel: tuple[int, int], options: Any
) -> None:
    """oneDNN's threads wait without sleep there, up to .4 s beside busy processes."""
    x = drawn(4, channels, 9, 7, dtype=torch.bfloat16).requires_grad_()
    master = drawn(16, channels, *kernel, seed=1).requires_grad_()
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, master)]
    y = F.conv2d(*exact, None, *options)
    gradient = drawn(*y.shape, seed=2).bfloat16()
    y.backward(gradient.double())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = convolve(x, master.detach().bfloat16(), *options, master)
        assert found is not None
        assert found.is_contiguous(memory_format=torch.channels_last)
        found.backward(gradient)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found.double(), y, rtol=2**-8, atol=2**-6)
    assert x.grad is not None
    assert exact[0].grad is not None
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=2**-8, atol=2**-6)
    assert master.grad is not None
    torch.testing.assert_close(master.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_and_images_without_a_gradient() -> None:
    x, w = drawn(3, 16, 4, 4), drawn(16, 16, 3, 3, seed=1)
    for images, weight in ((x.clone().requires_grad_(), w), (x, w.clone().requires_grad_())):
        y = convolve(images, weight, (1, 1), (1, 1), (1, 1))
        assert y is not None
        y.sum().backward()
        assert (images.grad is None) == (images is x)
        assert (weight.grad is None) == (weight is w)


def test_second_derivative_is_refused() -> None:
    x, w = drawn(3, 16, 4, 4).requires_grad_(), drawn(16, 16, 1, 1, seed=1)
    y = convolve(x, w, (1, 1), (0, 0), (1, 1))
    assert y is not None
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.skipif(torch.bfloat16 not in TYPES, reason="no products of bfloat16 on this CPU")
def test_the_master_gets_the_gradient_in_float32() -> None:
    master = drawn(32, 16, 3, 3, seed=1).requires_grad_()
    weight = master.detach().bfloat16().requires_grad_()
    x = drawn(5, 16, 6, 6, dtype=torch.bfloat16)
    y = convolve(x, weight, (1, 1), (1, 1), (1, 1), master)
    assert y is not None
    y.backward(drawn(*y.shape, dtype=torch.bfloat16, seed=2))
    assert weight.grad is None
    wide = weight.detach().double().requires_grad_()
    F.conv2d(x.double(), wide, padding=1).backward(drawn(*y.shape, seed=2).bfloat16().double())
    assert master.grad is not None
    torch.testing.assert_close(master.grad.double(), wide.grad, rtol=1e-5, atol=1e-4)


def test_what_stays_with_pytorch() -> None:
    x, w = drawn(2, 16, 4, 4), drawn(16, 16, 3, 3, seed=1)
    same = ((1, 1), (1, 1), (1, 1))
    assert convolve(x, w, *same) is not None
    for images, weight in (
        (x.double(), w.double()),
        (x.half(), w.half()),
        (x, w.bfloat16()),
        (x[:, :8], w[:, :8].contiguous(memory_format=torch.channels_last)),
        (x, w[:8]),
        (x, w.contiguous()),
        (x[0], w),
        (x[:0], w),
        (x[:, :, :0], w),
        (x.to("meta"), w.to("meta")),
        (x, w.to("meta")),
    ):
        assert convolve(images, weight, *same) is None
    with FlopCounterMode(display=False):
        assert convolve(x, w, *same) is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(32, 32, 1, bias=True),
        nn.Conv2d(32, 32, 3, groups=2, bias=False),
        nn.Conv2d(32, 32, 3, padding=1, bias=False, padding_mode="circular"),
        nn.Conv2d(32, 32, 3, padding="same", bias=False),
    )


def test_which_layers_are_compiled() -> None:
    part = network()
    compile_convolutions(part)
    compile_convolutions(part)
    assert [type(layer) is CompiledConv2d for layer in part] == [i == 2 for i in range(7)]
    assert [type(layer) is PixelConv2d for layer in part] == [i == 0 for i in range(7)]
    assert list(part.state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_encoder_computes_what_the_plain_one_does(bf16: bool) -> None:
    if bf16 and torch.bfloat16 not in TYPES:
        pytest.skip("no products of bfloat16 on this CPU")
    torch.manual_seed(0)
    plain = build_encoder("resnet18", 32)(num_classes=32).to(memory_format=torch.channels_last)
    encoder = copy.deepcopy(plain)
    compile_convolutions(encoder)
    encoder = pickle.loads(pickle.dumps(copy.deepcopy(encoder)))
    assert sum(type(layer) is CompiledConv2d for layer in encoder.modules()) == 19
    x = drawn(16, 3, 64, 64)

    def gradients(of: nn.Module, low: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = of(x.to(next(of.parameters()).dtype))
        y.double().square().mean().backward()
        return torch.cat([p.grad.double().flatten() for p in of.parameters()])

    exact = gradients(copy.deepcopy(plain).double(), low=False)
    pytorch, ours = ((gradients(of, bf16) - exact).norm() for of in (plain, encoder))
    assert 0 < ours < 1.2 * pytorch  # BatchNorm makes more of the rounding


def test_tracing_compiling_and_transforms_see_pytorch() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    compile_convolutions(layer)
    x = drawn(2, 16, 5, 5)
    expected = F.conv2d(x, layer.weight, padding=1)
    exported = torch.export.export(layer, (x,))
    assert "conv2d" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    each = torch.func.vmap(lambda image: layer(image[None])[0])(x)
    torch.testing.assert_close(each, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        _, tangent = torch.autograd.forward_ad.unpack_dual(layer(dual))
    torch.testing.assert_close(tangent, F.conv2d(torch.ones_like(x), layer.weight, padding=1))


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_leaves_no_trace_but_what_was_trained(shared: bool) -> None:
    part = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)))
    if shared:
        part[1].weight = part[0].weight
    plain = copy.deepcopy(part)
    places = [weight.data_ptr() for weight in part.parameters()]
    x = drawn(2, 16, 5, 5)

    def train() -> None:
        with compiled_convolutions(part):
            assert all(
                w.is_contiguous(memory_format=torch.channels_last) for w in part.parameters()
            )
            with compiled_convolutions(part):
                torch.testing.assert_close(part(x), plain(x))
            assert all(type(layer) is CompiledConv2d for layer in part)
            for model in (part, plain):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                model(x).square().mean().backward()
                optimizer.step()
            raise KeyError("ended")

    with pytest.raises(KeyError, match="ended"):
        train()
    assert all(type(layer) is nn.Conv2d for layer in part)
    assert places == [weight.data_ptr() for weight in part.parameters()]
    assert len(places) == 2 - shared
    for weight, expected in zip(part.parameters(), plain.parameters()):
        assert weight.is_contiguous()
        torch.testing.assert_close(weight, expected)


def test_a_block_compiles_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other CPUs and devices; and compiled encoders stay compiled."""
    part = network()
    with compiled_convolutions(part.to("meta")):
        assert type(part[2]) is nn.Conv2d
    part = network()
    with monkeypatch.context() as patch:
        patch.setattr(convolutions, "convolves", lambda dtype: False)
        with compiled_convolutions(part):
            assert type(part[2]) is nn.Conv2d
    compile_convolutions(part)
    with compiled_convolutions(part):
        pass
    assert type(part[2]) is CompiledConv2d


def test_threads_that_evaluate_an_encoder_at_the_same_time() -> None:
    encoder = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(6)))
    images = torch.randn(2, 64, 9, 9)
    with torch.no_grad():
        expected = encoder(images)

    def evaluate(_: int) -> bool:
        with torch.no_grad(), compiled_convolutions(encoder):
            return torch.allclose(encoder(images), expected, atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(evaluate, range(200)))
    assert {type(part) for part in encoder} == {nn.Conv2d}
    assert all(weight.is_contiguous() for weight in encoder.parameters())


def test_blocks_inside_of_blocks_leave_no_trace() -> None:
    """The outer block is left first, as threads do."""
    part = nn.Conv2d(16, 16, 3, bias=False)
    outer, inner = compiled_convolutions(part), compiled_convolutions(part)
    address = part.weight.data_ptr()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert type(part) is CompiledConv2d
    assert part.weight.is_contiguous(memory_format=torch.channels_last)
    inner.__exit__(None, None, None)
    assert type(part) is nn.Conv2d
    assert part.weight.is_contiguous() and part.weight.data_ptr() == address
