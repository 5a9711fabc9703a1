"""BatchNorm over ranks, in real processes, equals PyTorch's BatchNorm on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mocofast.models.sync_batch_norm as module
from mocofast.models.sync_batch_norm import SyncBatchNorm, sync_batch_norm

WORLD = 2


def network() -> nn.Module:
    """A BatchNorm over pixels, and a BatchNorm over vectors without weights."""
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5, affine=False))
    return nn.Sequential(*images, *vectors).double()


def images() -> Tensor:
    """Two batches of 6 images. Their halves differ, which shows statistics of a single rank."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    return noise + torch.arange(6).view(1, 6, 1, 1, 1)


def trained(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Takes a step a batch. Returns outputs, gradients of inputs, and the final state dict."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for step, batch in enumerate(batches):
        x = batch.clone().requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        # A weighted sum, because the plain sum of BatchNorm's outputs is always 0.
        weights = torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)
        (y * weights * x.mean((1, 2, 3)).unsqueeze(1)).mean().backward()
        optimizer.step()
        found |= {f"output {step}": y.detach(), f"gradient {step}": x.grad}
    state = {
        name.removeprefix("module."): value.clone() for name, value in model.state_dict().items()
    }
    return found | state


def on_a_rank(rank: int) -> dict[str, Any]:
    model = network()
    sync_batch_norm(model)
    slices = [batch.chunk(WORLD)[rank] for batch in images()]
    found = trained(DistributedDataParallel(model, broadcast_buffers=False), slices)
    model.eval()
    # On one rank only, because eval mode does not wait for other ranks.
    found["eval"] = model(images()[0]).detach() if rank == 0 else None
    return found


def test_two_ranks_equal_one_process_on_the_whole_batch() -> None:
    ranks = on_ranks(on_a_rank, WORLD)
    whole = network()
    expected = trained(whole, list(images()))
    for name, value in expected.items():
        if name.startswith(("output", "gradient")):
            # The loss of a rank is a mean over half of the images: gradients of inputs double.
            factor = WORLD if name.startswith("gradient") else 1
            got = torch.cat([rank[name] for rank in ranks])
            torch.testing.assert_close(got, factor * value, rtol=1e-9, atol=1e-12, msg=name)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, rtol=1e-9, atol=1e-12, msg=name)
    whole.eval()
    torch.testing.assert_close(ranks[0]["eval"], whole(images()[0]), rtol=1e-9, atol=1e-12)


def test_in_one_process_it_is_an_ordinary_batchnorm_that_keeps_weights_and_statistics() -> None:
    ordinary, sync = network(), network()
    trained(ordinary, list(images()))
    sync.load_state_dict(ordinary.state_dict())
    weights = dict(sync.named_parameters())
    sync_batch_norm(sync)
    assert [type(module) for module in sync].count(SyncBatchNorm) == 2
    assert all(value is weights[name] for name, value in sync.named_parameters())
    found, expected = (trained(model, list(images())) for model in (sync, ordinary))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_batchnorm_that_keeps_no_statistics_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="sync_bn: expected BatchNorm with running statistics"):
        sync_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 4)])
def test_a_gpus_kernels_compute_what_the_cpu_does(shape: tuple[int, ...]) -> None:
    """The three functions that differ by device, for one of two ranks with equal sums."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator)
    weight = torch.randn(5, generator=generator)

    def parts(device: str, dtype: torch.dtype) -> list[Tensor]:
        here, upstream, scale = (tensor.to(device, dtype) for tensor in (x, grad, weight))
        if len(shape) == 4:
            here = here.contiguous(memory_format=torch.channels_last)
            upstream = upstream.contiguous(memory_format=torch.channels_last)
        mean, variance = module._moments(here, 1e-5)
        inverse_std = torch.rsqrt(variance + 1e-5)
        sums = module._gradient_sums(upstream, here, mean, inverse_std)
        return [
            mean,
            variance,
            sums,
            module._gradient(upstream, here, mean, inverse_std, scale, 2 * sums, 2),
        ]

    for got, expected in zip(parts("cuda", torch.float32), parts("cpu", torch.float64)):
        torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=1e-5)
