"""All engine modes give one trajectory.

On a CPU the mode "graph" runs, without a capture, the code that a GPU captures.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from mocofast_bench.processes import on_ranks
from mocofast_bench.step import HostSynchronisations
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from mocofast import MoCo
from mocofast.config import METHODS, ConfigError, OptimConfig
from mocofast.device import choose_autocast
from mocofast.evaluate.features import extract
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.models.encoders import TinyResNet
from mocofast.optim import FusedSGD
from mocofast.optim.fused import FusedOptimizer
from mocofast.settings import apply, load_recipe
from mocofast.train.engine import Engine, choose_mode, garbage_collection_paused
from mocofast.train.metrics import StepMetrics
from mocofast.train.optimizer import optimizer_of
from mocofast.train.step import FlatGradients, train_step
from tests.eager_moco import PlainEncoder

CPU = torch.device("cpu")
MEAN, STD = (125.0, 123.0, 114.0), (63.0, 62.0, 66.0)
IMAGES = 12  # in a batch, which divides into 2 or 3 micro-batches, 2 splits or 2 ranks
Step = Callable[[tuple[Tensor, ...]], StepMetrics]


def tiny_vit(num_classes: int) -> nn.Module:
    return VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=num_classes)


def small_moco(base: Callable[..., nn.Module] = TinyResNet, **options: Any) -> MoCo:
    """Returns a MoCo for short runs.

    The queue of 50 keys wraps around within 5 steps. A momentum of 0.9 moves the key encoder
    visibly.
    """
    torch.manual_seed(0)
    options = {
        "dim": 16,
        "queue_size": 50,
        "momentum": 0.9,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        **options,
    }
    return MoCo(base, **options).to(memory_format=torch.channels_last)


def batches(steps: int, last: int = IMAGES) -> Iterator[tuple[Tensor, ...]]:
    """Yields pairs of uint8 views, (IMAGES, 3, 8, 8), channels-last.

    The last batch but one has `last` images, as the end of an epoch may have.
    """
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        size = last if i == steps - 2 else IMAGES
        pixels = torch.randint(0, 256, (2, size, 3, 8, 8), dtype=torch.uint8, generator=generator)
        yield tuple(view.contiguous(memory_format=torch.channels_last) for view in pixels)


def plain_step(
    method: Method, optimizer: FusedOptimizer, precision: str, accumulate: int = 1
) -> Step:
    """Returns a step with PyTorch's autocast, without an engine."""
    autocast = choose_autocast(precision, CPU)
    return lambda views: train_step(method, views, optimizer, accumulate, autocast)


def engine_step(
    mode: str,
    method: Method,
    optimizer: FusedOptimizer,
    precision: str,
    accumulate: int = 1,
    backend: Any = None,
) -> Step:
    engine = Engine(
        mode,
        method,
        optimizer,
        choose_autocast(precision, CPU),
        accumulate,
        IMAGES // accumulate,
        backend,
    )
    return engine.step


def trajectory(
    step: Step,
    method: Method,
    optimizer: FusedOptimizer,
    data: Iterator[tuple[Tensor, ...]],
    first: int = 0,
) -> dict[str, Tensor]:
    """Trains, and returns the metrics of every step and the final state, by name.

    Learning rate and momentum change at every step.
    """
    metrics = []
    for i, views in enumerate(data, first):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (i + 1)
        optimizer.ema_momentum = 0.9 + 0.01 * i
        metrics.append(step(views).values.clone())
    # After a step the rates are floats again, for a state dict.
    assert all(group["lr"] == 0.1 / (i + 1) for group in optimizer.param_groups)
    momenta = [buffer.flatten() for state in optimizer.state.values() for buffer in state.values()]
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    return {"metrics": torch.stack(metrics).nan_to_num(-1), **state, "momenta": torch.cat(momenta)}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def run(
    mode: str, precision: str, accumulate: int = 1, backend: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Runs six steps in a mode of the engine, or in mode "plain" without an engine."""
    model = small_moco(**options)
    optimizer = optimizer_of(model, OptimConfig())
    torch.manual_seed(5)  # seeds the shuffle of split BatchNorm
    if mode == "plain":
        step = plain_step(model, optimizer, precision, accumulate)
    else:
        step = engine_step(mode, model, optimizer, precision, accumulate, backend)
    return trajectory(step, model, optimizer, batches(6, last=8))


# ---- one trajectory ----


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ({"base": PlainEncoder}, 1),
        ({}, 1),
        ({"bn_splits": 2, "mlp": True}, 1),
        ({"bn_splits": 2}, 2),
        ({"base": tiny_vit}, 1),
    ],
    ids=["no BatchNorm", "v1", "v2, split BatchNorm", "micro-batches", "ViT"],
)
def test_bf16_shadows_and_the_step_on_fixed_buffers_follow_autocast_bit_by_bit(
    options: dict, accumulate: int
) -> None:
    expected = run("plain", "bf16", accumulate, **options)
    for mode in ("eager", "graph"):
        assert_equal(run(mode, "bf16", accumulate, **options), expected)


def test_in_float32_every_mode_follows_the_plain_step() -> None:
    options: dict[str, Any] = {"bn_splits": 2, "symmetric": True}
    expected = run("plain", "fp32", **options)
    for mode, backend in (("eager", None), ("graph", None), ("compile", "aot_eager")):
        ours = run(mode, "fp32", backend=backend, **options)
        if backend is None:
            assert_equal(ours, expected)
        # Compiled BatchNorm is composed of other operations, so it rounds differently.
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_step_on_fixed_buffers_is_the_eager_step_and_never_waits(name: str) -> None:
    config = load_recipe("digits")
    sizes = {"model.dim": 16, "model.hidden_dim": 24, "model.prototypes": 10}
    apply(config, {"model.method": name, **sizes})
    apply(config, {"model.queue_size": 20, "model.freeze_prototypes": 2, "optim.name": "lars"})

    def found(mode: str, precision: str, accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = build_method(config, images=40, classes=4).to(memory_format=torch.channels_last)
        optimizer = optimizer_of(method, config.optim)
        generator = torch.Generator().manual_seed(2)

        def fields(images: int) -> dict[str, Tensor]:
            offered = {
                "index": torch.randint(40, (images,), generator=generator),
                "labels": torch.randint(4, (images,), generator=generator),
                "tokens": torch.randint(3, 250, (images, 9), generator=generator),
            }
            names = ("tokens",) if name == "clip" else method.batch_fields
            return {field: offered[field] for field in names}

        autocast = choose_autocast(precision, CPU)
        if mode == "plain":
            step: Callable[..., StepMetrics] = partial(
                train_step, method, optimizer=optimizer, accumulate=accumulate, autocast=autocast
            )
        else:
            images = IMAGES // accumulate
            step = Engine(mode, method, optimizer, autocast, accumulate, images, None).step
        torch.manual_seed(5)

        def taken(views: tuple[Tensor, ...]) -> StepMetrics:
            return step(views[: method.num_views], fields=fields(len(views[0])))

        result = trajectory(taken, method, optimizer, batches(5, last=8))
        if mode == "plain":
            (views,) = batches(1)
            with HostSynchronisations() as waits:
                taken(views)
            # On a CPU, info_nce reads a temperature that is a tensor. On a GPU the kernels read it.
            assert waits.count == 0 or name == "clip"
        return result

    assert_equal(found("graph", "fp32", 2), found("plain", "fp32", 2))
    # bf16 without micro-batches, because a method that uses an encoder twice sums the gradients of
    # several micro-batches in another order.
    assert_equal(found("graph", "bf16", 1), found("eager", "bf16", 1))


@pytest.mark.slow
def test_compiled_encoders_follow_the_plain_step() -> None:
    expected = run("plain", "fp32", bn_splits=2)
    ours = run("compile", "fp32", backend="inductor", bn_splits=2)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_shadows_are_the_weights_after_every_step() -> None:
    model = small_moco(tiny_vit, mlp=True)
    optimizer = optimizer_of(model, OptimConfig(lr=0.1))
    step = engine_step("eager", model, optimizer, "bf16")
    companions = optimizer._companions
    for views in batches(3):
        step(views)
        copies = 0
        for p, (target, shadow, target_shadow) in companions.items():
            for weight, copy in ((p, shadow), (target, target_shadow)):
                if copy is not None:
                    assert torch.equal(copy, weight.to(torch.bfloat16))
                    copies += 1
    # A weight and a bias of 7 layers, in both encoders: the patches, two layers of the attention,
    # two of the MLP, two of the head.
    assert copies == 2 * 7 * 2


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_continued_run_equals_one_never_stopped(mode: str) -> None:
    def started() -> tuple[MoCo, FusedOptimizer]:
        model = small_moco(bn_splits=2)
        return model, optimizer_of(model, OptimConfig())

    whole, optimizer = started()
    torch.manual_seed(5)
    expected = trajectory(engine_step(mode, whole, optimizer, "bf16"), whole, optimizer, batches(6))

    model, optimizer = started()
    torch.manual_seed(5)
    data = batches(6)
    first = [next(data) for _ in range(3)]
    found = trajectory(engine_step(mode, model, optimizer, "bf16"), model, optimizer, iter(first))
    assert torch.equal(found["metrics"], expected["metrics"][:3])
    state, weights, random = optimizer.state_dict(), model.state_dict(), model.random_state()
    model, optimizer = started()
    torch.manual_seed(6)
    model.load_state_dict(weights)
    model.load_random_state(random)
    optimizer.load_state_dict(state)
    ours = trajectory(engine_step(mode, model, optimizer, "bf16"), model, optimizer, data, first=3)
    assert_equal(ours, expected | {"metrics": expected["metrics"][3:]})


def ranks_trajectories(rank: int) -> dict[str, dict[str, Tensor]]:
    """Trains on this rank's half of every batch, in every mode and precision."""
    found = {}
    for mode, precision in itertools.product(("eager", "graph"), ("fp32", "bf16")):
        model = small_moco()
        if rank:  # the run must take the weights of rank 0
            for p in model.parameters():
                p.data.add_(1)
        optimizer = optimizer_of(model, OptimConfig())
        torch.manual_seed(5)
        autocast = choose_autocast(precision, CPU)
        engine = Engine(mode, model, optimizer, autocast, 1, IMAGES // 2, None)
        halves = (tuple(view.chunk(2)[rank] for view in views) for views in batches(5, 8))
        found[f"{mode} {precision}"] = trajectory(engine.step, model, optimizer, halves)
    return found


def test_two_ranks_follow_one_trajectory_in_every_mode() -> None:
    first, second = on_ranks(ranks_trajectories)
    for precision in ("fp32", "bf16"):
        for found in (first, second):
            for name, value in found[f"eager {precision}"].items():
                # Half of a sum is exact, so both ways of averaging give equal bits.
                assert torch.equal(found[f"graph {precision}"][name], value), name
        for name in ("encoder_q.conv1.weight", "encoder_k.fc.weight", "queue"):
            assert torch.equal(
                first[f"graph {precision}"][name], second[f"graph {precision}"][name]
            )


class FakeGraph:
    """A stand-in for a CUDA graph on a CPU. A replay runs the step again."""

    engine: Engine

    def replay(self) -> None:
        metrics = self.engine._train_on_buffers()
        assert self.engine._metrics is not None
        self.engine._metrics.values.copy_(metrics.values)


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, **_: Any) -> Iterator[None]:
    """Restores all state at the end of the block, because a capture changes nothing."""
    engine = graph.engine
    states = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    companions = [tensor for row in engine.optimizer._companions.values() for tensor in row]
    copies = [tensor for tensor in companions if tensor is not None]
    tensors = [*engine.method.state_dict().values(), *states, *copies]
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before):
        tensor.data.copy_(value)


def test_warm_up_capture_and_launches_train_on_every_batch_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tests everything about a captured step on a CPU, except the capture."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock)
    options: dict[str, Any] = {"bn_splits": 2, "symmetric": True}
    found = []
    for mode in ("eager", "graph"):
        model = small_moco(**options)
        optimizer = optimizer_of(model, OptimConfig())
        engine = Engine(mode, model, optimizer, choose_autocast("bf16", CPU), 1, IMAGES, None)
        FakeGraph.engine = engine
        engine._stream = Mock()
        torch.manual_seed(5)
        found.append(trajectory(engine.step, model, optimizer, batches(9, last=8)))
    assert engine._graph is not None
    assert model.second_stream is not None
    assert_equal(found[1], found[0])


def test_a_weight_without_gradient_is_not_decayed_with_gradients_in_fixed_buffers() -> None:
    used, unused = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(4))
    gradients = FlatGradients([used, unused])
    optimizer = FusedSGD([used, unused], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        gradients.zero_()
        (3 * used).sum().backward()
        gradients.average_()
        optimizer.step()
    assert torch.equal(unused, torch.ones(4))
    assert torch.equal(used.grad, torch.full((3, 5), 3.0))  # cleared in between
    assert used.grad.data_ptr() % 16 == 0


def test_gradients_in_fixed_buffers_have_the_strides_of_the_momentum() -> None:
    # A weight with gaps between its columns: gradient and momentum take the order of the strides,
    # without gaps.
    gaps = torch.ones(5, 6)[:, ::2].t()
    dense = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for weight in (nn.Parameter(gaps), nn.Parameter(dense)):
        gradients = FlatGradients([weight])
        optimizer = FusedSGD([weight], lr=0.1, momentum=0.9)
        (3 * weight).sum().backward()
        gradients.average_()
        optimizer.step()
        assert weight.grad.stride() == optimizer.state[weight]["momentum_buffer"].stride()
        assert torch.equal(weight.grad, torch.full(weight.shape, 3.0))


# ---- compilations, waits, garbage ----


def test_each_encoder_is_compiled_once_and_never_again() -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model = small_moco(bn_splits=2, mlp=True)
    optimizer = optimizer_of(model, OptimConfig())
    step = engine_step("compile", model, optimizer, "bf16", backend=counting)
    first, *others = batches(5, last=8)
    step(first)
    assert len(compiled) == 2
    assert min(compiled) > 20  # nodes: each graph holds a whole encoder
    for views in others:
        images = (views[0], torch.zeros(len(views[0]), dtype=torch.int64), torch.zeros(0))
        extract(model.encoder_q, [images], CPU, "backbone", torch.tensor(MEAN), torch.tensor(STD))
        model.eval()
        model(*views)
        model.train()
        step(views)  # one batch is smaller than the others
    assert len(compiled) == 2


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
def test_a_steady_step_never_asks_for_a_tensors_value(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_moco(bn_splits=2, symmetric=True)
    optimizer = optimizer_of(model, OptimConfig())
    step = engine_step(
        mode, model, optimizer, "bf16", backend="eager" if mode == "compile" else None
    )
    first, second, third = batches(3)
    step(first)
    step(second)
    if mode == "graph":  # on a CPU the optimiser reads its numbers, which are tensors in this mode
        monkeypatch.setattr(optimizer, "step", lambda: None)
    with HostSynchronisations() as waits:
        step(third)
        assert waits.count == 0
        model.queue_ptr.item()  # shows that the counter counts
    assert waits.count == 1


def test_garbage_is_collected_only_when_asked() -> None:
    collections: list[str] = []

    def record(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    assert gc.isenabled()
    with garbage_collection_paused():
        gc.callbacks.append(record)
        try:
            cycles = [[] for _ in range(100_000)]  # 50 times as many as start a collection
            for cycle in cycles:
                cycle.append(cycle)
            assert collections == []
            del cycles, cycle
            assert gc.collect() >= 100_000
        finally:
            gc.callbacks.remove(record)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()  # as before the block
    finally:
        gc.enable()


# ---- choice ----


def test_auto_names_its_mode_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_mode("auto", CPU, 1)[0] == "eager"
    assert choose_mode("auto", gpu, 1)[0] == "compile"
    assert choose_mode("auto", gpu, 8)[0] == "compile"
    assert choose_mode("compile", CPU, 1) == ("compile", "as asked")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    mode, why = choose_mode("auto", gpu, 1)
    assert mode == "eager"
    assert "Triton" in why
    for name in ("compile", "graph"):
        with pytest.raises(ConfigError, match=f"engine.mode: {name} needs Triton"):
            choose_mode(name, gpu, 1)
    assert choose_mode("compile", CPU, 1)[0] == "compile"


@pytest.mark.parametrize("wide", [True, False])
def test_the_reason_on_a_cpu_names_what_runs_in_c(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm needs AVX-512, and convolutions AVX2."""
    monkeypatch.setattr("mocofast.train.engine.convolves", lambda dtype: True)
    monkeypatch.setattr("mocofast.train.engine.normalises", lambda dtype: wide)
    start = "convolutions and BatchNorm run" if wide else "convolutions run"
    assert choose_mode("auto", CPU, 1)[1].startswith(start)


def test_a_cpu_refuses_the_graph_mode() -> None:
    with pytest.raises(ConfigError, match=r"engine\.mode: graph is a CUDA graph and needs a GPU"):
        choose_mode("graph", CPU, 1)
