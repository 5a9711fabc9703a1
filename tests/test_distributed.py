"""Two gloo processes run all functions once. The tests look at the results of both ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast import MoCo, distributed, rendezvous
from mocofast.errors import ConfigError
from mocofast.methods.base import MethodOutput
from mocofast.models.encoders import TinyResNet
from tests.eager_moco import (
    EagerMoCo,
    PlainEncoder,
    assert_same_to_rounding,
    differ_from_rank_0,
    random_batches,
    sgd_trajectory,
)

WORLD = 2
PER_RANK = 5  # odd, so that a rank cannot receive equally many images from rank 0 and rank 1
STEPS = 5  # 50 keys into 23 rows: two wrap-arounds, in the middle of a batch


def small_moco(base: type[nn.Module], **options: Any) -> MoCo:
    return MoCo(
        base, **{"dim": 13, "queue_size": 23, "momentum": 0.9, "temperature": 0.1, **options}
    )


def own_slice(batches: list[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(im.chunk(WORLD)[rank] for im in pair) for pair in batches]  # type: ignore[misc]


def three_trajectories(rank: int, base: type[nn.Module], **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = small_moco(base, **options)
    eager, exact = EagerMoCo(model, torch.float32), EagerMoCo(model, torch.float64)
    differ_from_rank_0(model, rank)
    batches = own_slice(random_batches(STEPS, WORLD * PER_RANK), rank)
    found = {}
    for name, each in (("ours", model), ("eager", eager), ("exact", exact)):
        torch.manual_seed(7 + rank)  # ranks' default generators differ: rank 0's decides
        found[name] = sgd_trajectory(each, batches)
    return {
        **found,
        "pointer": (
            model.queue_ptr.clone(),
            exact.pointer,
            STEPS * WORLD * PER_RANK * (1 + model.symmetric) % 23,
        ),
        "buffers": (dict(model.encoder_q.named_buffers()), dict(eager.encoder_q.named_buffers())),
    }


@contextmanager
def counted(function: str, record: Callable[..., Any]) -> Iterator[list[Any]]:
    """Yields a list that collects record(arguments) of every call of a collective.

    function: name of the collective in torch.distributed.
    """
    calls: list[Any] = []
    original = getattr(dist, function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(record(*args, **kwargs))
        return original(*args, **kwargs)

    setattr(dist, function, wrapper)
    try:
        yield calls
    finally:
        setattr(dist, function, original)


def shuffles(rank: int) -> dict[str, Any]:
    """Runs batches through BatchShuffle. Expected: the batch indexed by rank 0's permutations."""
    results = []
    shuffle = distributed.BatchShuffle()
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7 + rank)
    kinds = (torch.uint8, torch.bfloat16, torch.float32)
    for dtype, channels_last in [(dtype, flag) for dtype in kinds for flag in (True, False)]:
        whole = torch.arange(WORLD * PER_RANK * 3 * 2 * 4).view(-1, 3, 2, 4).to(dtype)
        mine = whole.chunk(WORLD)[rank]
        if channels_last:
            mine = mine.contiguous(memory_format=torch.channels_last)
        with counted(
            "all_to_all_single", lambda out, inp, outs, ins: (out.dtype, outs, ins)
        ) as sent:
            got, restore = shuffle(mine)
        permutation = torch.randperm(len(whole), generator=generator)
        back = distributed.all_gather(got.contiguous())[restore]
        results.append(
            {
                "got": got,
                "expected": whole[permutation.view(WORLD, -1)[rank]],
                "in order": torch.equal(back, whole),
                "channels last": (
                    got.is_contiguous(memory_format=torch.channels_last),
                    channels_last,
                ),
                "sent": sent,
            }
        )
    state = shuffle.state()
    first = [shuffle(whole.chunk(WORLD)[rank])[0] for _ in range(3)]
    # A resumed run: only rank 0 has the state.
    shuffle.load_state(state if rank == 0 else None)
    again = [shuffle(whole.chunk(WORLD)[rank])[0] for _ in range(3)]
    return {"batches": results, "first": first, "again": again}


def broadcasts(rank: int) -> dict[str, list[list[str]]]:
    """Returns names of the broadcasts in three steps under DDP: of a plain model and of MoCo."""
    im_q, im_k = own_slice(random_batches(1, WORLD * PER_RANK), rank)[0]
    found = {}
    for name, model, images in (
        ("plain", TinyResNet(4), (im_q,)),
        ("moco", small_moco(TinyResNet), (im_q, im_k)),
    ):
        wrapped = DistributedDataParallel(model)
        found[name] = []
        for _ in range(3):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                out = wrapped(*images)
                (out.loss if isinstance(out, MethodOutput) else out.sum()).backward()
            found[name].append(
                [e.name for e in profile.events() if e.name.startswith("c10d::broadcast")]
            )
    return found


def one_process_against_two(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return sgd_trajectory(small_moco(PlainEncoder), own_slice(random_batches(STEPS, 16), rank))


def on_a_rank(rank: int) -> dict[str, Any]:
    found = {
        "joined": distributed.init_from_environment("cpu"),
        "main": distributed.is_main(),
        "no BatchNorm": three_trajectories(rank, PlainEncoder),
        "v1": three_trajectories(rank, TinyResNet),
        "v2": three_trajectories(rank, TinyResNet, mlp=True, temperature=0.2),
        "symmetric": three_trajectories(rank, TinyResNet, symmetric=True),
        "two": one_process_against_two(rank),
        "shuffles": shuffles(rank),
        "broadcasts": broadcasts(rank),
    }
    # Three steps in eval mode on one rank only: no collective may wait for the other.
    model = small_moco(TinyResNet).eval()
    if rank == 0:
        found["eval"] = [model(*pair).loss.detach() for pair in random_batches(3, 4)]
    distributed.barrier()
    distributed.shutdown()
    found["left"] = distributed.rank_and_world_size()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(on_a_rank, WORLD)


def test_ranks_join_and_leave_as_torchrun_says(ranks: list[dict[str, Any]]) -> None:
    assert [r["joined"] for r in ranks] == [(0, 2, 0), (1, 2, 1)]
    assert [r["main"] for r in ranks] == [True, False]
    assert [r["left"] for r in ranks] == [(0, 1), (0, 1)]
    assert len(ranks[0]["eval"]) == 3


@pytest.mark.parametrize("case", ["no BatchNorm", "v1", "v2", "symmetric"])
def test_trajectory_on_two_ranks_equals_eager_moco(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        found = rank[case]
        assert_same_to_rounding(found["ours"], found["eager"], found["exact"])
        pointer, eager_pointer, expected = found["pointer"]
        assert pointer.tolist() == [eager_pointer] == [expected]
    for name, value in ranks[0][case]["ours"].items():
        if name != "losses":
            assert torch.equal(value, ranks[1][case]["ours"][name]), name
    ours, eager = ranks[0][case]["buffers"]
    for name, value in ours.items():  # running statistics of rank 0, which a checkpoint keeps
        torch.testing.assert_close(value, eager[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_permutation_matters_with_batchnorm(ranks: list[dict[str, Any]]) -> None:
    # Without this difference, the tests above would pass with any permutation.
    torch.manual_seed(0)
    model = small_moco(TinyResNet)
    unshuffled = sgd_trajectory(
        EagerMoCo(model, torch.float64), random_batches(STEPS, WORLD * PER_RANK)
    )
    shuffled = (ranks[0]["v1"]["exact"]["losses"] + ranks[1]["v1"]["exact"]["losses"]) / 2
    assert (unshuffled["losses"] - shuffled).abs().max() > 1e-2


def test_two_ranks_of_8_equal_one_of_16_without_batchnorm(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    one = sgd_trajectory(small_moco(PlainEncoder), random_batches(STEPS, 16))
    for rank in ranks:
        for name in one.keys() - {"losses"}:
            torch.testing.assert_close(rank["two"][name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    mean = (ranks[0]["two"]["losses"] + ranks[1]["two"]["losses"]) / 2
    torch.testing.assert_close(mean, one["losses"], rtol=1e-5, atol=1e-6)


def test_shuffle_gives_every_rank_its_slice_of_rank_0s_permutations(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        for batch in rank["shuffles"]["batches"]:
            assert torch.equal(batch["got"], batch["expected"])
            assert batch["in order"]
            is_channels_last, expected = batch["channels last"]
            assert is_channels_last == expected


def test_shuffle_sends_each_image_once_in_its_own_dtype(ranks: list[dict[str, Any]]) -> None:
    crossed = 0
    for batches in zip(*(r["shuffles"]["batches"] for r in ranks)):
        for number, batch in enumerate(batches):
            ((dtype, received, sent),) = batch["sent"]  # one exchange per step
            assert dtype == batch["got"].dtype
            assert sum(sent) == sum(received) == PER_RANK
            crossed += received[1 - number]
    steps = len(ranks[0]["shuffles"]["batches"])
    # (W-1)/W of the images on average, 30 of 60 here. In an all-gather all 60 images would cross.
    assert 0 < crossed < 0.8 * steps * WORLD * PER_RANK


def test_shuffle_continues_from_its_state(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["shuffles"]
        assert all(torch.equal(a, b) for a, b in zip(found["first"], found["again"]))
        assert not torch.equal(found["first"][0], found["first"][1])


def test_no_buffer_is_broadcast_again_after_the_first_step(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # DDP broadcasts by default, which also proves that the profile shows broadcasts.
        assert all(rank["broadcasts"]["plain"])
        first, second, third = rank["broadcasts"]["moco"]
        assert first
        # DDP agrees on the order of gradient buckets once, by two broadcasts in the second step.
        assert len(second) <= 2
        assert third == []


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init_from_environment("cpu") == (0, 1, 0)
    assert not dist.is_initialized()
    assert distributed.is_main()
    distributed.barrier()
    distributed.shutdown()


def test_one_process_shuffles_by_the_default_generators_permutations() -> None:
    images = torch.arange(7 * 3 * 2 * 2).view(7, 3, 2, 2)
    shuffle = distributed.BatchShuffle()
    assert shuffle.state() is None
    torch.manual_seed(5)
    expected = [images[torch.randperm(7)] for _ in range(2)]
    torch.manual_seed(5)
    for each in expected:
        shuffled, restore = shuffle(images)
        assert torch.equal(shuffled, each)
        assert torch.equal(shuffled[restore], images)
        torch.rand(3)  # other uses of the default generator have no influence


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without GPUs")
def test_more_processes_than_gpus_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="needs cuda:0, and there are 0 GPUs"):
        distributed.init_from_environment("cuda")


def test_ranks_that_cannot_meet_name_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [...] remote=[127.0.0.1]:9643\nmore")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setattr(rendezvous, "meet", lambda: (dist.HashStore(), 0, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"9643\). .* GLOO_SOCKET_IFNAME=eth0 on CPUs"):
        distributed.init_from_environment("cpu")
