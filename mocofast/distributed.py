"""What ranks exchange: images for shuffled BatchNorm, keys for the queue; and the start and end of a process group.

Everything works in one process without a process group as well, as rank 0 of a world of 1.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocofast.config import ConfigError
from mocofast.step_parts import step_part

TORCHRUN = (
    ("RANK", "0"),
    ("WORLD_SIZE", "1"),
    ("LOCAL_RANK", "0"),
)  # and what stands for them in one process


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank_and_world_size()[0] == 0


def init_from_environment(device: torch.device | str) -> tuple[int, int, int]:
    """Joins the process group that torchrun's environment describes: (rank, world size, local rank).

    device: a CUDA device means nccl, with this process's GPU (`cuda:LOCAL_RANK`) made the current one; anything
    else means gloo. Without torchrun, or with one process only, no group is made, and a device that names its GPU
    (`cuda:1`) becomes the current one.
    """
    device = torch.device(device)
    rank, world_size, local_rank = (int(os.environ.get(name, alone)) for name, alone in TORCHRUN)
    if device.type == "cuda":
        index = local_rank if world_size > 1 or device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: process {local_rank} of this machine needs cuda:{index}, and there are "
                f"{torch.cuda.device_count()} GPUs; start at most one process per GPU"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return rank, world_size, local_rank


def barrier() -> None:
    """Waits until every rank is here."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def shutdown() -> None:
    """Leaves the process group, if there is one.

    Models wrapped in DistributedDataParallel have to be gone by then. One that outlives the group ends gloo's threads
    itself, with Python's lock in its hands: a thread that still waits for that lock, to let go of the last
    collective's tensors, is waited for without end (pytorch/pytorch#56297).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def from_main(value: Any) -> Any:
    """Rank 0's value (anything that pickles), on every rank."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value (anything that pickles), on every rank, ranks in order."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def all_gather(local: Tensor) -> Tensor:
    """(N, C) of each rank, N the same on all -> (W*N, C), ranks in order. No gradient flows through it."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return local
    gathered = local.new_empty(world_size * len(local), *local.shape[1:])
    with step_part("communication"):
        dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


class SharedGenerator:
    """A generator on the CPU that draws the same on every rank.

    It starts, when it is first asked for, from rank 0's default one: the same draws from then on, without a broadcast
    and without waiting for the device.
    """

    def __init__(self) -> None:
        self._generator: torch.Generator | None = None
        self._agreed = False

    def state(self) -> Tensor | None:
        """The generator's state (uint8), equal on all ranks, for a checkpoint; None before the first draw."""
        return None if self._generator is None else self._generator.get_state()

    def load_state(self, state: Tensor | None) -> None:
        """Continues from `state()` of another run, or afresh from None; to be called on every rank, at any time."""
        self._generator = None
        if state is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state.cpu())
        self._agreed = False

    def generator(self, device: torch.device) -> torch.Generator:
        """To draw from, by all ranks together. device: where the process group can exchange tensors."""
        if self._generator is not None and self._agreed:
            return self._generator
        state = torch.get_rng_state() if self._generator is None else self._generator.get_state()
        if rank_and_world_size()[1] > 1:
            on_device = state.to(device)
            dist.broadcast(on_device, 0)
            state = on_device.cpu()
        self.load_state(state)
        self._agreed = True
        assert self._generator is not None
        return self._generator


class BatchShuffle(SharedGenerator):
    """Random re-distribution of a batch over ranks, "shuffling BN" of MoCo (He et al. 2020, section 3.3).

    BatchNorm's statistics of a rank's batch would let a query recognise its own key; shuffled, a key is normalised
    together with other images than its query was. The permutations are those of facebookresearch/moco, which draws
    each from rank 0's default CPU generator and broadcasts it. Here every rank draws the same, which also tells it on
    the host how many images each other one sends it.
    """

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the shuffled global batch, (N, ...), and the index that restores the order.

        images: (N, ...), N the same on all ranks. restore: (W*N,) int64 on the images' device:
        `all_gather(x)[restore]` has, for rows `x` computed from the shuffled images, the order of the ranks'
        original batches. Each image is sent at most once, in its own dtype; channels-last stays channels-last.
        """
        rank, world_size = rank_and_world_size()
        size = len(images)
        permutation = torch.randperm(world_size * size, generator=self.generator(images.device))
        position = torch.argsort(
            permutation
        )  # (W*N,): the place of each image in the shuffled batch
        # index_select would turn channels-last into NCHW, so rows are taken from the (N, H, W, C) view.
        channels_last = images.dim() == 4 and images.is_contiguous(
            memory_format=torch.channels_last
        )
        rows = images.permute(0, 2, 3, 1) if channels_last else images
        if world_size == 1:
            permutation, restore = to_device([permutation, position], images.device)
            rows = rows.index_select(0, permutation)
        else:
            mine = slice(rank * size, (rank + 1) * size)
            targets, origins = (
                position[mine],
                permutation[mine],
            )  # of the images that leave, and that arrive
            # Sorted by target place, images leave grouped by target rank; they arrive grouped by rank of origin.
            leave = torch.argsort(targets)
            arrive = torch.argsort(torch.argsort(origins // size, stable=True))
            leave, arrive, restore = to_device([leave, arrive, position], images.device)
            sent = rows.index_select(0, leave)
            received = torch.empty_like(sent)
            with step_part("communication"):
                dist.all_to_all_single(
                    received,
                    sent,
                    _count(origins // size, world_size),
                    _count(targets // size, world_size),
                )
            rows = received.index_select(0, arrive)
        return (rows.permute(0, 3, 1, 2) if channels_last else rows), restore


def _count(ranks: Tensor, world_size: int) -> list[int]:
    return torch.bincount(ranks, minlength=world_size).tolist()


def to_device(indices: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Index tensors in one copy; from pinned memory to a GPU, so that the host does not wait for it."""
    joined = torch.cat(indices)
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    return joined.split([len(i) for i in indices])
