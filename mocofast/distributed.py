"""Process groups, and exchange between ranks: images for shuffled BatchNorm, keys for the queue.

Without a process group every function treats the process as rank 0 of a world of size 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mocofast import rendezvous
from mocofast.config import ConfigError
from mocofast.shares import Shares
from mocofast.step_parts import step_part

# Variables that torchrun sets, with the values of a single process.
TORCHRUN = (
    ("RANK", "0"),
    ("WORLD_SIZE", "1"),
    ("LOCAL_RANK", "0"),
)


def rank_and_world_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes: (0, 1) without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main() -> bool:
    """Returns whether this process is rank 0, which writes files and prints."""
    return rank_and_world_size()[0] == 0


def init_from_environment(device: torch.device | str) -> tuple[int, int, int]:
    """Joins the process group that the environment of torchrun describes.

    device: a CUDA device selects nccl and makes `cuda:LOCAL_RANK` the current device. Other
        devices select gloo.

    A single process joins no group. A CUDA device with an index (`cuda:1`) then becomes the
    current device.

    Returns (rank, world size, local rank).
    Raises ConfigError if this machine has fewer GPUs than processes.
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
        try:
            store, rank, world_size = rendezvous.meet()
            on_cuda = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=rendezvous.MINUTES,
                device_id=device if on_cuda else None,
            )
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"network: the processes cannot reach one another ({str(error).splitlines()[0]}). "
                "If the name of a host resolves to an address that the others cannot reach, name "
                "the interface: GLOO_SOCKET_IFNAME=eth0 on CPUs, NCCL_SOCKET_IFNAME=eth0 on GPUs"
            ) from error
        _stores.append(store)
    return rank, world_size, local_rank


_stores: list[dist.PrefixStore] = []  # of the process group


def own_store() -> dist.Store | None:
    """Returns a connection of its own to the ranks' store. None without a group of this module."""
    return _stores[0].clone() if _stores else None  # type: ignore[attr-defined]


def barrier() -> None:
    """Waits until every rank has called this function."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def shutdown() -> None:
    """Leaves the process group, if a group exists.

    Delete models wrapped in DistributedDataParallel before the call. A wrapper that outlives the
    group joins gloo's threads while holding Python's global lock. A gloo thread may wait for the
    same lock, to release tensors of the last collective: a deadlock (pytorch/pytorch#56297).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _stores.clear()


def from_main(value: Any) -> Any:
    """Returns the value of rank 0 on every rank.

    value: any object that pickles.
    """
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all ranks, in order of ranks, on every rank.

    value: any object that pickles.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


_sharing: list[Shares] = []  # of the present micro-batch, set by `sharing`


@contextlib.contextmanager
def sharing(shares: Shares) -> Iterator[None]:
    """Inside the block, `shares` tells how many images of the (micro-)batch every rank has."""
    _sharing.append(shares)
    try:
        yield
    finally:
        _sharing.pop()


def shares_of(images: int) -> Shares:
    """Returns the images of every rank: as `sharing` tells, or `images` on each.

    images: number of this rank's images.
    """
    return _sharing[-1] if _sharing else Shares((images,) * rank_and_world_size()[1])


def own_rows(images: int) -> slice:
    """Returns the rows of this rank in the result of `gather_rows`. images: its own number."""
    start = shares_of(images).start(rank_and_world_size()[0])
    return slice(start, start + images)


def own_numbers(images: int, device: torch.device) -> Tensor:
    """Returns the numbers in the batch of this rank's images, (N,) int64.

    images: N. Of several views of the images, joined, view v counts from v times the batch.
    """
    shares, rank = shares_of(images), rank_and_world_size()[0]
    own = shares.counts[rank]
    if shares.parts and len(shares.counts) > 1:
        numbers = indices_to_device([torch.from_numpy(shares.rows(rank))], device)[0]
    else:
        start = shares.start(rank)
        numbers = torch.arange(start, start + own, device=device)
    if images == own:
        return numbers
    views = torch.arange(images // own, device=device) * shares.total
    return (views.unsqueeze(1) + numbers).view(-1)


def gather_rows(local: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, in order of ranks, without gradients.

    local: (N, ...), a row for every image of this rank. Ranks may have different N.

    Returns (T, ...) on every rank.
    """
    shares = shares_of(len(local))
    return cut(all_gather(padded(local, shares)), shares)


def in_order(gathered: Tensor, shares: Shares) -> Tensor:
    """Returns rows in the order of ranks, (T, ...), in the order of the batch."""
    places = shares.places()
    if places is None:
        return gathered
    return gathered[indices_to_device([torch.from_numpy(places)], gathered.device)[0]]


def padded(local: Tensor, shares: Shares) -> Tensor:
    """Returns the rows of a rank with rows of zeros, as many as the rank of most rows has."""
    missing = max(shares.counts) - len(local)
    return F.pad(local, (0, 0) * (local.dim() - 1) + (0, missing)) if missing else local


def cut(gathered: Tensor, shares: Shares) -> Tensor:
    """Returns the padded rows of all ranks, (W*N, ...), without the rows of zeros, (T, ...)."""
    if shares.equal:
        return gathered
    of_ranks = gathered.chunk(len(shares.counts))
    return torch.cat([rows[:count] for rows, count in zip(of_ranks, shares.counts)])


def all_gather(local: Tensor) -> Tensor:
    """Concatenates the tensors of all ranks, in order of ranks, without gradients.

    local: (N, ...), with the same shape on every rank.

    Returns (W*N, ...) on every rank.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return local
    gathered = local.new_empty(world_size * len(local), *local.shape[1:])
    with step_part("communication"):
        dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


class SharedGenerator:
    """A CPU generator with the same random numbers on every rank.

    The first use broadcasts the state of rank 0's default generator. Later uses need neither a
    broadcast nor a wait for the device.
    """

    def __init__(self) -> None:
        self._generator: torch.Generator | None = None
        self._agreed = False

    def state(self) -> Tensor | None:
        """Returns the state (uint8, equal on all ranks), or None before the first use."""
        return None if self._generator is None else self._generator.get_state()

    def load_state(self, state: Tensor | None) -> None:
        """Continues from a state that `state()` returned. Call on every rank.

        state: uint8 tensor, or None to start from rank 0's default generator again.
        """
        self._generator = None
        if state is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state.cpu())
        self._agreed = False

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns the generator. All ranks must sample the same numbers from the generator.

        device: device of the tensors that the process group exchanges.
        """
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
    """Distributes a batch over ranks at random: "shuffling BN" (MoCo, arXiv:1911.05722, sec. 3.3).

    BatchNorm statistics of a rank's batch would let a query recognise its own key. After the
    shuffle, a key is normalised together with other images than its query.

    The permutations equal the permutations of facebookresearch/moco, which samples on rank 0, with
    the default CPU generator, and broadcasts. Here every rank samples the same permutation, so the
    host of every rank also knows how many images arrive from every rank.
    """

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's slice of the shuffled batch, (N, ...), and `restore`, (T,) int64.

        images: (N, ...), as many as `shares_of` tells. T: images of all ranks.

        `restore` is on the device of the images. For rows x that are computed from the slice,
        gather_rows(x)[restore] has the order of the batch: with consecutive shares, the images of
        rank 0 first. An image is sent at most once, in its own dtype. Channels-last memory stays
        channels-last.
        """
        # The permutation of the whole batch, the same on every rank.
        rank, world_size = rank_and_world_size()
        shares = shares_of(len(images))
        permutation = torch.randperm(shares.total, generator=self.generator(images.device))
        position = torch.argsort(permutation)  # (T,): an image's place in the shuffled batch

        # index_select would turn channels-last into NCHW, so the (N, H, W, C) view is indexed.
        channels_last = images.dim() == 4 and images.is_contiguous(
            memory_format=torch.channels_last
        )
        rows = images.permute(0, 2, 3, 1) if channels_last else images
        # gloo and NCCL send no uint16, so two bytes are sent.
        if images.dtype == torch.uint16:
            rows = rows.contiguous().view(torch.uint8)
        if world_size == 1:
            permutation, restore = indices_to_device([permutation, position], images.device)
            rows = rows.index_select(0, permutation)
        else:
            of_ranks = [torch.from_numpy(shares.rows(each)) for each in range(world_size)]
            owner = torch.empty(shares.total, dtype=torch.int64)  # of a place, and of an image
            for each, rows_of_rank in enumerate(of_ranks):
                owner[rows_of_rank] = each
            targets = position[of_ranks[rank]]  # (N,): places of the images that leave
            origins = permutation[of_ranks[rank]]  # (N,): numbers of the images that arrive
            to_ranks, from_ranks = owner[targets], owner[origins]
            # Images leave grouped by target rank, and arrive grouped by origin, each group in the
            # order of the batch.
            leave = torch.argsort(to_ranks, stable=True)
            by_origin = torch.argsort(from_ranks * shares.total + origins)
            arrive = torch.argsort(by_origin)
            if (places := shares.places()) is not None:
                position = torch.from_numpy(places)[position]
            leave, arrive, restore = indices_to_device([leave, arrive, position], images.device)
            sent = rows.index_select(0, leave)
            received = torch.empty_like(sent)
            with step_part("communication"):
                dist.all_to_all_single(
                    received,
                    sent,
                    _count(from_ranks, world_size),
                    _count(to_ranks, world_size),
                )
            rows = received.index_select(0, arrive)
        rows = rows.view(images.dtype)
        return (rows.permute(0, 3, 1, 2) if channels_last else rows), restore


def _count(ranks: Tensor, world_size: int) -> list[int]:
    """Returns how many entries name every rank."""
    return torch.bincount(ranks, minlength=world_size).tolist()


def indices_to_device(indices: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Moves index tensors to the device in a single copy.

    The copy to a GPU starts from pinned memory, so that the host does not wait.
    """
    joined = torch.cat(indices)
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    return joined.split([len(i) for i in indices])
