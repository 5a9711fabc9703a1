"""MoCo: trajectories against the eager formula, the queue, types, waits and mistakes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mocofast_kernels.cpu_ghost_bn import normalises
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mocofast.methods.moco
from mocofast import MoCo
from mocofast.models import batch_norm, fastest
from mocofast.models.encoders import TinyResNet
from tests.eager_moco import (
    EagerMoCo,
    PlainEncoder,
    assert_same_to_rounding,
    random_batches,
    sgd_trajectory,
)

MEAN, STD = (125.0, 123.0, 114.0), (63.0, 62.0, 66.0)


def small_moco(base: type[nn.Module] = PlainEncoder, **options: object) -> MoCo:
    """Returns a MoCo of 13 dimensions and 17 keys, both primes.

    A momentum of 0.9 moves the key encoder visibly within a few steps.
    """
    torch.manual_seed(0)
    defaults = {"dim": 13, "queue_size": 17, "momentum": 0.9, "temperature": 0.1}
    return MoCo(base, **{**defaults, **options})


@pytest.fixture
def float32_convolutions() -> Iterator[None]:
    """Forbids TF32. By default cuDNN rounds the operands of float32 convolutions to ten bits."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.usefixtures("float32_convolutions")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (PlainEncoder, {}),
        (TinyResNet, {}),
        (TinyResNet, {"mlp": True, "temperature": 0.2}),
        (TinyResNet, {"bn_splits": 3}),
        (TinyResNet, {"symmetric": True}),
        (TinyResNet, {"bn_splits": 3, "symmetric": True}),
    ],
    ids=["no BatchNorm", "v1", "v2", "split BatchNorm", "symmetric", "symmetric, split BatchNorm"],
)
def test_trajectory_is_that_of_eager_moco_through_a_wrap_around(
    base: type[nn.Module], options: dict, device: str
) -> None:
    # 6 steps of 6 keys (12 if symmetric) write 36 keys (72) into 17 rows: the queue wraps around in
    # the middle of a batch.
    # (With seed 1 a value lies so near the kink of a ReLU that the order of a sum decides.)
    batches = random_batches(steps=6, size=6, seed=2)
    model = small_moco(base, **options).to(device)
    eager, exact = EagerMoCo(model, torch.float32), EagerMoCo(model, torch.float64)
    trajectories = []
    for each in (model, eager, exact):
        torch.manual_seed(3)  # seeds the shuffle of split BatchNorm
        trajectories.append(sgd_trajectory(each, batches))
    if "bn_splits" in options:  # the eager BatchNorm has the same weights one level deeper
        trajectories[1:] = [
            {k.replace(".whole", ""): v for k, v in t.items()} for t in trajectories[1:]
        ]
    assert_same_to_rounding(*trajectories)
    assert int(model.queue_ptr) == exact.pointer == 36 * (1 + model.symmetric) % 17


@pytest.mark.parametrize("options", [{}, {"bn_splits": 3, "symmetric": True}], ids=["v1", "splits"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "encoders"])
def test_a_model_of_float64_has_the_trajectory_of_float64(whole: bool, options: dict) -> None:
    batches = random_batches(steps=4, size=6, seed=2)
    model = small_moco(TinyResNet, **options)
    exact = EagerMoCo(model, torch.float64)
    if whole:
        model.double()
    else:  # the queue stays float32
        model.encoder_q.double()
        model.encoder_k.double()
    trajectories = []
    for each in (model, exact):
        torch.manual_seed(3)  # seeds the shuffle of split BatchNorm
        trajectories.append(sgd_trajectory(each, batches))
    ours, wanted = trajectories
    tolerance = 1e-10 if whole else 1e-6
    for name, expected in wanted.items():
        value = ours[name.replace(".whole", "")]
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def test_every_encoder_has_running_statistics_of_its_own() -> None:
    model = small_moco(TinyResNet)
    eager = EagerMoCo(model, torch.float32)
    for each in (model, eager):
        sgd_trajectory(each, random_batches(steps=3, size=7))
    for (name, ours), theirs in zip(model.encoder_k.named_buffers(), eager.encoder_k.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(model.encoder_k.bn1.running_mean, model.encoder_q.bn1.running_mean)


def test_two_micro_batches_give_the_trajectory_of_one_batch_without_batchnorm() -> None:
    whole = small_moco()
    parts = copy.deepcopy(whole)
    batches = random_batches(steps=4, size=10)
    expected = sgd_trajectory(whole, batches)

    optimizer = torch.optim.SGD(
        parts.encoder_q.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
    )
    losses = []
    # Micro-batches of 4 and 6 images.
    for im_q, im_k in batches:
        optimizer.zero_grad()
        queue = parts.queue.clone()
        first = parts(im_q[:4], im_k[:4], enqueue=False)
        (first.loss * 0.4).backward()
        assert torch.equal(parts.queue, queue)
        second = parts(im_q[4:], im_k[4:], update_keys=False)
        (second.loss * 0.6).backward()
        optimizer.step()
        losses.append((first.loss * 0.4 + second.loss * 0.6).item())
    torch.testing.assert_close(
        torch.tensor(losses).double(), expected["losses"], rtol=1e-5, atol=1e-6
    )
    assert torch.equal(parts.queue_ptr, whole.queue_ptr)
    for (name, ours), theirs in zip(parts.state_dict().items(), whole.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_a_positive_is_never_among_its_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = mocofast.methods.moco.info_nce

    def recorded(query: Tensor, positive: Tensor, negatives: Tensor, **options: object) -> object:
        seen.append((positive.clone(), negatives.clone()))
        return original(query, positive, negatives, **options)

    monkeypatch.setattr(mocofast.methods.moco, "info_nce", recorded)
    model = small_moco(TinyResNet, bn_splits=2)
    batches = random_batches(steps=4, size=6)
    for im_q, im_k in batches:
        model(im_q[:2], im_k[:2], enqueue=False)
        model(im_q[2:], im_k[2:], update_keys=False)
    assert len(seen) == 8
    for positive, negatives in seen:
        assert (positive @ negatives.t()).max() < 1 - 1e-4
    # The keys of a step are among the negatives of the next one, so the test above can fail.
    assert torch.isin(seen[0][0][:, 0], seen[2][1][:, 0]).all()


def test_loss_and_rank_are_those_of_the_paper_in_eval_mode_which_changes_nothing() -> None:
    model = small_moco(TinyResNet, mlp=True).eval()
    im_q, im_k = random_batches(1, 5)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(im_q, im_k)
    loss, positive_rank = output.loss, output.rank
    q = F.normalize(model.encoder_q(im_q).double(), dim=1)
    k = F.normalize(model.encoder_k(im_k).double(), dim=1)
    positive, negatives = (q * k).sum(1, keepdim=True), q @ model.queue.double().t()
    expected = F.cross_entropy(
        torch.cat([positive, negatives], 1) / 0.1, torch.zeros(5, dtype=torch.int64)
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(positive_rank.long(), (negatives > positive).sum(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "queue_size", [100, 3, 1], ids=["larger than the data set", "smaller than a batch", "one key"]
)
def test_queue_of_any_size_keeps_the_newest_keys_in_order(queue_size: int) -> None:
    model = small_moco(queue_size=queue_size)
    noise = model.queue.clone()
    written: list[Tensor] = []
    # Two epochs of a data set of 14 images. The last batch of an epoch is small.
    for size in (7, 5, 2, 7, 5, 2):
        im_q, im_k = random_batches(1, size, seed=len(written))[0]
        out = model(im_q, im_k)
        assert math.isfinite(out.loss.item())
        assert out.rank.shape == (size,)
        written.extend(F.normalize(model.encoder_k(im_k), dim=1))
    expected = noise
    for i, key in enumerate(written):
        expected[i % queue_size] = key
    torch.testing.assert_close(model.queue, expected, rtol=1e-5, atol=1e-6)
    assert model.queue_ptr.tolist() == [28 % queue_size]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_queue_is_stored_in_the_chosen_type(dtype: torch.dtype | str) -> None:
    model = small_moco(queue_dtype=dtype)
    im_q, im_k = random_batches(1, 5)[0]
    loss = model(im_q, im_k).loss
    assert loss.dtype == torch.float32
    assert model.queue.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
    keys = F.normalize(model.encoder_k(im_k), dim=1)
    # 1e-2: an ulp of bfloat16.
    torch.testing.assert_close(model.queue[:5], keys.to(model.queue.dtype), rtol=0, atol=1e-2)


def test_uint8_images_are_normalised_on_the_way_in() -> None:
    model = small_moco(pixel_mean=MEAN, pixel_std=torch.tensor(STD))
    pixels = torch.randint(0, 256, (2, 5, 3, 8, 8), dtype=torch.uint8)
    im_q, im_k = (x.contiguous(memory_format=torch.channels_last) for x in pixels)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    same = copy.deepcopy(model)
    expected = same((im_q - mean) / std, (im_k - mean) / std)
    torch.testing.assert_close(model(im_q, im_k).loss, expected.loss)
    assert "pixel_mean" not in model.state_dict()


def test_keys_are_unit_vectors_in_float32_under_autocast() -> None:
    model = small_moco(pixel_mean=MEAN, pixel_std=STD)
    pixels = torch.randint(0, 256, (2, 5, 3, 8, 8), dtype=torch.uint8)
    seen: list[torch.dtype] = []
    model.encoder_q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*pixels).loss
    loss.backward()
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    # Keys are normalised in float32 after the bfloat16 encoder. In bfloat16 the rounding of a norm
    # would be 1e-3.
    torch.testing.assert_close(model.queue[:5].norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)


class Dispatched(TorchDispatchMode):
    """Records the names of all operators that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("bn_splits", [1, 3])
def test_the_fastest_format_of_a_cpu_gives_equal_gradients(
    bn_splits: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split BatchNorm is faster with channels first where BatchNorm has no kernel."""
    if kernel and not normalises(torch.float32):
        pytest.skip("no kernel of BatchNorm on this CPU")
    for module in (fastest, batch_norm):
        monkeypatch.setattr(module, "normalises", lambda dtype: kernel)
    found = []
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    for is_fastest in (True, False):
        torch.manual_seed(0)
        model = small_moco(TinyResNet, bn_splits=bn_splits, pixel_mean=MEAN, pixel_std=STD)
        model.to(memory_format=torch.channels_last)
        if is_fastest:
            model.to_fastest_format(torch.device("cpu"), bn_splits)
        images = model.normalize_pixels(pixels)
        assert images.is_contiguous() == (is_fastest and bn_splits > 1 and not kernel)
        encoder = model.encoder_q.double()
        output = encoder(images.double())
        output.mul(torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append([output.detach(), *(p.grad for p in encoder.parameters())])
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bn_splits", [1, 2])
def test_a_steady_step_never_asks_for_a_tensors_value(bn_splits: int) -> None:
    model = small_moco(TinyResNet, bn_splits=bn_splits, pixel_mean=MEAN, pixel_std=STD)
    pixels = torch.randint(0, 256, (2, 6, 3, 8, 8), dtype=torch.uint8)
    model(*pixels).loss.backward()
    with Dispatched() as dispatched:
        model(*pixels).loss.backward()
    assert "convolution" in dispatched.names
    waiting = {"_local_scalar_dense", "nonzero", "equal", "unique", "masked_select"}
    assert not waiting & set(dispatched.names)


@pytest.mark.gpu
@pytest.mark.parametrize("bn_splits", [1, 2])
def test_a_steady_step_does_not_wait_for_the_gpu(bn_splits: int) -> None:
    model = small_moco(TinyResNet, bn_splits=bn_splits, pixel_mean=MEAN, pixel_std=STD)
    model = model.to("cuda", memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (2, 6, 3, 8, 8), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            model(*pixels).loss.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(*pixels).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_forward_compiles_into_one_graph() -> None:
    model = small_moco(TinyResNet, mlp=True)
    uncompiled = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for im_q, im_k in random_batches(steps=3, size=6):
        ours, expected = compiled(im_q, im_k), uncompiled(im_q, im_k)
        ours.loss.backward()
        torch.testing.assert_close(ours.loss, expected.loss)
        assert torch.equal(ours.rank, expected.rank)
    torch.testing.assert_close(model.queue, uncompiled.queue)


def test_key_encoder_takes_no_gradient_and_starts_as_a_copy() -> None:
    model = small_moco(TinyResNet, mlp=True)
    for q, k in zip(model.encoder_q.state_dict().values(), model.encoder_k.state_dict().values()):
        assert torch.equal(q, k)
        assert q.data_ptr() != k.data_ptr()
    pointers = [p.data_ptr() for p in model.parameters()]
    model(*random_batches(1, 4)[0]).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    # Updated in place: every parameter keeps its storage.
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_an_encoder_that_got_more_parameters_is_named() -> None:
    model = small_moco()
    model.encoder_q.fc = nn.Sequential(model.encoder_q.fc, nn.ReLU(), nn.Linear(13, 13))
    images = random_batches(1, 4)[0]
    with pytest.raises(ValueError, match="encoder_k must have the parameters of encoder_q: got 4"):
        model(*images)
    model.make_momentum_encoder(model.momentum)
    model(*images).loss.backward()
    assert torch.equal(model.encoder_k.fc[2].weight, model.encoder_q.fc[2].weight)


def test_initial_queue_is_unit_noise() -> None:
    queue = MoCo(PlainEncoder, dim=7, queue_size=1000).queue
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(1000))
    # 5 standard errors of the mean of a unit vector's component, in 7 dimensions.
    assert queue.mean(0).abs().max() < 0.06


def test_defaults_are_the_papers() -> None:
    model = MoCo(PlainEncoder)
    assert (model.queue.shape, model.momentum, model.temperature) == ((65536, 128), 0.999, 0.07)
    assert model.queue.dtype == torch.float32
    assert isinstance(model.encoder_q.fc, nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"queue_size": 0}, "queue_size must be at least 1"),
        ({"bn_splits": 0}, "bn_splits must be at least 1"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"queue_dtype": "int8"}, "queue_dtype must be one of float32"),
        ({"queue_dtype": torch.int32}, "queue_dtype must be one of float32"),
        ({"pixel_mean": MEAN}, "belong together"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCo(PlainEncoder, **options)


def test_bad_images_change_nothing() -> None:
    model = small_moco()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    im_q, im_k = random_batches(1, 4)[0]
    message = r"im_k must have the shape of im_q: got \(3, 3, 8, 8\) and \(4, 3, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        model(im_q, im_k[:3])
    with pytest.raises(TypeError, match="pixel_mean and pixel_std"):
        model(im_q.byte(), im_k.byte())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_importing_the_package_loads_no_torch_and_importing_ops_loads_no_data_libraries() -> None:
    code = """
import sys
import mocofast
assert "torch" not in sys.modules
assert mocofast.ops.info_nce
from mocofast import MoCo
for name in ("triton", "nvidia.dali", "matplotlib", "torchvision"):
    assert name not in sys.modules, name
try:
    mocofast.missing
except AttributeError as error:
    assert "missing" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
