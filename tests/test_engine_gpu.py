"""The captured step on a GPU gives the eager trajectory, in few launches, without waiting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mocofast import MoCo
from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.models.encoders import TinyResNet
from mocofast.optim.fused import FusedOptimizer
from mocofast.train.engine import STEPS_BEFORE_CAPTURE, Engine
from mocofast.train.metrics import StepMetrics, Window
from mocofast.train.optimizer import optimizer_of

pytestmark = pytest.mark.gpu
MEAN, STD = (125.0, 123.0, 114.0), (63.0, 62.0, 66.0)
IMAGES = 16
STEPS = 14  # the warm-up, the capture, and ten launches of the graph
LAUNCHES = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)


class Run:
    """A MoCo, an optimiser and an engine. Learning rate and momentum change at every step."""

    def __init__(
        self,
        mode: str,
        precision: str = "fp32",
        accumulate: int = 1,
        backend: Any = None,
        **options: Any,
    ):
        torch.manual_seed(0)
        cuda = torch.device("cuda", torch.cuda.current_device())
        options = {
            "dim": 16,
            "queue_size": 50,
            "momentum": 0.9,
            "pixel_mean": MEAN,
            "pixel_std": STD,
            **options,
        }
        self.model = MoCo(TinyResNet, **options).to(cuda, memory_format=torch.channels_last)
        self.optimizer: FusedOptimizer = optimizer_of(self.model, OptimConfig())
        autocast = choose_autocast(precision, cuda)
        self.arguments = (autocast, accumulate, IMAGES // accumulate, backend)
        self.mode, self.done = mode, 0
        self.window = Window(cuda)
        torch.manual_seed(5)  # seeds the shuffle of split BatchNorm

    def start(self) -> None:
        self.engine = Engine(self.mode, self.model, self.optimizer, *self.arguments)

    def step(self, views: tuple[Tensor, ...]) -> StepMetrics:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (self.done + 1)
        self.optimizer.ema_momentum = 0.9 + 0.005 * self.done
        self.done += 1
        metrics = self.engine.step(views)
        self.window.add(metrics, len(views[0]), 0.0)
        return metrics

    def train(self, data: Iterator[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Trains, and returns the metrics of every step and the final state, by name."""
        metrics = torch.stack([self.step(views).values.clone() for views in data])
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        return {"metrics": metrics, **state}


def batches(last: int = IMAGES) -> list[tuple[Tensor, ...]]:
    """Returns STEPS pairs of uint8 views, (IMAGES, 3, 8, 8), channels-last.

    The last batch but one has `last` images, as the end of an epoch may have.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(STEPS):
        size = last if i == STEPS - 2 else IMAGES
        pixels = torch.randint(0, 256, (2, size, 8, 8, 3), dtype=torch.uint8, generator=generator)
        found.append(tuple(pixels.cuda().permute(0, 1, 4, 2, 3)))
    return found


@pytest.fixture(autouse=True)
def same_algorithms() -> Iterator[None]:
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield


def assert_close(
    ours: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float
) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16", "mlp": True},
        {"precision": "bf16", "bn_splits": 2, "symmetric": True},
        {"bn_splits": 2, "accumulate": 2},
    ],
    ids=["v1", "bf16", "symmetric, split BatchNorm", "micro-batches"],
)
def test_graph_follows_the_eager_trajectory(options: dict[str, Any]) -> None:
    data = batches(last=8)
    found = []
    for mode in ("eager", "graph"):
        run = Run(mode, **options)
        run.start()
        found.append(run.train(iter(data)))
    assert run.engine._graph is not None
    # The same kernels run in the same order, except that gradients are added to zeros.
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert all(isinstance(group["lr"], float) for group in run.optimizer.param_groups)


def test_graph_with_small_views_follows_the_eager_trajectory() -> None:
    channels_last = torch.channels_last
    data = [
        (*views, *(view[..., :5, :5].contiguous(memory_format=channels_last) for view in views))
        for views in batches()
    ]
    found = []
    for mode in ("eager", "graph"):
        run = Run(mode, bn_splits=2, symmetric=True)
        run.start()
        found.append(run.train(iter(data)))
    assert run.engine._graph is not None
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_compiled_and_captured_steps_follow_the_eager_trajectory() -> None:
    data = batches()
    found = []
    for mode, backend in (("eager", None), ("compile", "inductor"), ("graph", "inductor")):
        run = Run(mode, backend=backend, bn_splits=2)
        run.start()
        found.append(run.train(iter(data)))
    for ours in found[1:]:
        # float32 sums are taken in another order. One rounding of all weights grows to 1e-6 in
        # 14 steps (measured on a CPU).
        assert_close(ours, found[0], rtol=1e-3, atol=1e-3)
    assert_close(found[2], found[1], rtol=1e-5, atol=1e-6)


def test_keys_encoded_on_a_side_stream_are_the_same() -> None:
    data = batches()
    found = []
    for on_side_stream in (True, False):
        run = Run("graph", "bf16", bn_splits=2)
        run.start()
        run.step(data[0])
        assert run.model.second_stream is not None  # the images are small
        if not on_side_stream:
            run.model.second_stream = None
        found.append(run.train(iter(data[1:])))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_continued_run_follows_one_never_stopped() -> None:
    data = batches()
    whole = Run("graph", "bf16", bn_splits=2)
    whole.start()
    expected = whole.train(iter(data))
    first = Run("graph", "bf16", bn_splits=2)
    first.start()
    first.train(iter(data[:7]))  # long enough to launch the graph
    weights = copy.deepcopy(first.model.state_dict())
    state = copy.deepcopy(first.optimizer.state_dict())
    second = Run("graph", "bf16", bn_splits=2)
    second.model.load_state_dict(weights)
    second.model.load_random_state(first.model.random_state())
    second.optimizer.load_state_dict(state)
    second.done = 7
    second.start()
    expected["metrics"] = expected["metrics"][7:]
    assert_close(second.train(iter(data[7:])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_steady_step_waits_for_nothing(mode: str) -> None:
    run = Run(mode, "bf16", bn_splits=2)
    run.start()
    data = batches()
    for views in data[: STEPS_BEFORE_CAPTURE + 2]:
        run.step(views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views in data[STEPS_BEFORE_CAPTURE + 2 :]:
            run.step(views)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_steady_step_is_a_handful_of_launches() -> None:
    run = Run("graph", "bf16")
    run.start()
    data = batches()
    for views in data[: STEPS_BEFORE_CAPTURE + 2]:
        run.step(views)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for views in data[STEPS_BEFORE_CAPTURE + 2 :]:
            run.step(views)
        torch.cuda.synchronize()
    steps = STEPS - STEPS_BEFORE_CAPTURE - 2
    launches = [event for event in profiler.events() if event.name.startswith(LAUNCHES)]
    assert sum(event.name == "cudaGraphLaunch" for event in launches) == steps
    # Six launches: two views, rate and momentum (this schedule changes both at every step), the
    # graph, the sum of the window.
    assert len(launches) / steps <= 6
