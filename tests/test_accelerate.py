"""`mocofast.MoCo` under Hugging Face Accelerate on two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast import MoCo
from mocofast.models.encoders import TinyResNet
from tests.eager_moco import PlainEncoder, random_batches, sgd_trajectory

pytest.importorskip("accelerate")

WORLD, PER_RANK, STEPS = 2, 8, 4  # 64 keys into 24 rows: the queue starts again in a batch
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3  # of `sgd_trajectory`


def small_moco(base: type[nn.Module]) -> MoCo:
    torch.manual_seed(0)
    return MoCo(base, dim=13, queue_size=24, momentum=0.9, temperature=0.1)


def accelerated(rank: int, base: type[nn.Module], accumulate: int = 1) -> dict[str, Tensor]:
    """Trains with everything that Accelerate prepares, and returns what `sgd_trajectory` does.

    accumulate: batches of a step.
    Also returns "gradient": of the last encoder weight in the first step.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = small_moco(base)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    images = [pair for batch in random_batches(STEPS, WORLD * PER_RANK) for pair in zip(*batch)]
    loader = torch.utils.data.DataLoader(images, PER_RANK)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert type(prepared) is DistributedDataParallel
    assert accelerator.num_processes == WORLD and accelerator.process_index == rank
    losses, gradient = [], None
    for im_q, im_k in loader:
        if not losses:  # after the numbers that the loader draws
            torch.manual_seed(7 + rank)
        is_first = len(losses) % accumulate == 0
        with accelerator.accumulate(prepared):
            is_last = accelerator.sync_gradients
            loss = prepared(im_q, im_k, update_keys=is_first, enqueue=is_last).loss
            accelerator.backward(loss)
            if gradient is None and is_last:
                gradient = list(model.encoder_q.parameters())[-1].grad.clone()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    assert accelerator.unwrap_model(prepared) is model
    accelerator.free_memory()  # DistributedDataParallel ends before the group
    result = {"losses": torch.stack(losses), **dict(model.named_parameters()), "queue": model.queue}
    found = {name: value.detach().double().clone() for name, value in result.items()}
    return {**found, "gradient": gradient.double()}


def on_a_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "accumulated": accelerated(rank, PlainEncoder, accumulate=2),
        "accelerate": {
            base.__name__: accelerated(rank, base) for base in (PlainEncoder, TinyResNet)
        },
    }
    batches = random_batches(STEPS, WORLD * PER_RANK)
    own = [tuple(im.chunk(WORLD)[rank] for im in pair) for pair in batches]
    model = small_moco(TinyResNet)
    torch.manual_seed(7 + rank)
    found["DDP"] = sgd_trajectory(model, own)  # type: ignore[arg-type]
    assert dist.get_world_size() == WORLD
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(on_a_rank, WORLD)


def test_accelerate_on_two_ranks_equals_ddp_with_batchnorm(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, expected in rank["DDP"].items():
            assert torch.equal(rank["accelerate"]["TinyResNet"][name], expected), name
    first, second = (rank["accelerate"]["TinyResNet"] for rank in ranks)
    assert not torch.equal(first["losses"], second["losses"])  # of images of their own
    assert all(torch.equal(first[name], second[name]) for name in first.keys() - {"losses"})


def one_process(accumulate: int) -> dict[str, Tensor]:
    """Trains on whole batches without Accelerate, and returns what `accelerated` does."""
    model, losses, gradient = small_moco(PlainEncoder), [], None
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    for number, (im_q, im_k) in enumerate(random_batches(STEPS, WORLD * PER_RANK)):
        is_first, is_last = number % accumulate == 0, (number + 1) % accumulate == 0
        loss = model(im_q, im_k, update_keys=is_first, enqueue=is_last).loss
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if is_last:
            if gradient is None:
                gradient = list(model.encoder_q.parameters())[-1].grad.clone()
            optimizer.step()
            optimizer.zero_grad()
    assert gradient is not None
    result = {"losses": torch.stack(losses), **dict(model.named_parameters()), "queue": model.queue}
    return {name: x.detach().double() for name, x in {**result, "gradient": gradient}.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_on_two_ranks_equals_a_process_with_the_whole_batch(
    ranks: list[dict[str, Any]], accumulate: int
) -> None:
    expected = one_process(accumulate)
    found = [
        rank["accelerate"]["PlainEncoder"] if accumulate == 1 else rank["accumulated"]
        for rank in ranks
    ]
    mean = (found[0]["losses"] + found[1]["losses"]) / 2
    torch.testing.assert_close(mean, expected["losses"], rtol=1e-4, atol=1e-5)
    for each in found:
        assert each.keys() == expected.keys()
        for name in each.keys() - {"losses"}:
            got, want = each[name], expected[name]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
