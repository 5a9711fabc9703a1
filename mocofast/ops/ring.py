"""Losses over the keys of all ranks, with memory for the keys of two ranks: blocks on a ring.

Every rank computes its own queries against a block of keys while the next block arrives from the
previous rank, as Inf-CL does (Cheng et al. 2024, arXiv:2410.17243). Neither the keys of all ranks
nor their logits lie in memory. In the backward pass the gradients of a block travel with the block
until they are back at its owner.

The losses of two sets of negatives merge exactly. With d = log(sum over the negatives) - s_+ / T
the loss is log(1 + e^d), so d adds up in the log domain. The gradients of a set count
e^(loss of the set - loss) times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.cpu_ranks import worst_rank
from mocofast_kernels.cpu_vectors import softplus
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import sweep
from mocofast.ops.checks import FEATURES
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.sweep import Options


class Ring(NamedTuple):
    """The place of this rank among the ranks of a group."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    counts: list[int]  # rows of keys on every rank
    period: int  # own key j is left out of row i where j % period == i % period

    def blocks(self, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields (rank that owns the block, block) for the blocks of all ranks, the own one first.

        keys: (n, C), the own block. A block arrives while the one before it is in use.
        """
        block = keys.detach().contiguous()
        for step in range(len(self.counts)):
            waiting = None
            if step + 1 < len(self.counts):
                waiting = self._pass_on(block, self.counts[self.rank - step - 1])
            yield (self.rank - step) % len(self.counts), block
            if waiting is not None:
                block = waiting()

    def collect(self, keys: Tensor, part: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Returns the sum over ranks of part(owner, own keys), which every rank computes.

        keys: (n, C). part: takes the owner and its block, and returns a tensor like the block.
        """
        total: Tensor | None = None
        for owner, block in self.blocks(keys):
            own = part(owner, block)
            total = own if total is None else total + own
            if len(self.counts) > 1:  # on to the next rank, the last time to the owner
                total = self._pass_on(total, self.counts[(owner - 1) % len(self.counts)])()
        assert total is not None
        return total

    def excluded(self, owner: int) -> Exclusion:
        """Returns what this rank leaves out of a block: the own rows, in the own block."""
        return Exclusion(self.period if owner == self.rank else 0)

    def _pass_on(self, tensor: Tensor, arriving: int) -> Callable[[], Tensor]:
        """Sends to the next rank and receives `arriving` rows. Returns a function that waits."""
        size = len(self.counts)
        received = tensor.new_empty(arriving, *tensor.shape[1:])
        following, previous = (
            dist.get_global_rank(self.group, (self.rank + shift) % size) for shift in (1, -1)
        )
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, following, self.group),
                dist.P2POp(dist.irecv, received, previous, self.group),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait


@torch.compiler.disable
def ring_of(group: Any, **features: Tensor) -> Ring:
    """Returns the ring of a group of ranks.

    features: {name of the argument: features (n, C) of this rank}, of equal shapes.

    The ranks compare widths, types and whether gradients are wanted: a host wait. Numbers of rows
    may differ. Raises ValueError on every rank alike where the ranks disagree, TypeError where
    group is no process group.
    """
    first = next(iter(features.values()))
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns on other ranks
        raise ValueError("group must hold this rank: got a group of other ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, torch.distributed.group.WORLD say, "
            f"or None: got {group!r}"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in features.values()]
    own = [len(first), first.shape[1], *(FEATURES.index(x.dtype) for x in features.values())]
    told = torch.tensor(own + wanted, device=first.device)
    gathered = told.new_empty(size * len(told))
    dist.all_gather_into_tensor(gathered, told, group)
    rows = gathered.view(size, -1).tolist()
    count = len(features)
    for what, values in {
        "widths": [row[1] for row in rows],
        "types": [[str(FEATURES[i]) for i in row[2 : 2 + count]] for row in rows],
        "needs of a gradient": [[bool(x) for x in row[2 + count :]] for row in rows],
    }.items():
        if any(value != values[0] for value in values):
            names = ", ".join(features)
            raise ValueError(f"{names} must have equal {what} on all ranks of group: got {values}")
    return Ring(group, rank, [row[0] for row in rows], len(first))


@torch.compiler.disable
def info_nce(
    query: Tensor,
    positive: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    ring: Ring,
    *,
    normalize: bool,
    return_rank: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns losses (N,) of this rank's queries against the keys of all ranks, and positive ranks.

    query, positive: (N, C). keys: (K, C), the own block of negatives. Own key j is left out of row
        i where j % P == i % P, P the number of rows of this rank in `ring`. K is a multiple of P:
        one view of the rows, or more.
    """
    options = Options(normalize, normalize, return_rank, sweep.dot_dtype(query, positive, keys))
    scalar, tensor = (0.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    sweep.refuse_transforms(query, positive, keys, tensor)
    views = len(keys) // ring.period
    ring = ring._replace(counts=[views * count for count in ring.counts])
    return _RingInfoNCE.apply(query, positive, keys, tensor, scalar, options, ring)


class _RingInfoNCE(torch.autograd.Function):
    """InfoNCE on a ring: sweeps merge in the forward pass, the keys' gradients travel backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        keys: Tensor,
        temperature: Tensor | None,
        scalar: float,
        options: Options,
        ring: Ring,
    ) -> tuple[Tensor, Tensor | None]:
        need_query, need_positive, _, need_temperature = ctx.needs_input_grad[:4]
        ctx.options, ctx.scalar, ctx.ring = options, scalar, ring
        ctx.dtypes = (query.dtype, positive.dtype, keys.dtype)
        total: InfoNCEForward | None = None
        for owner, block in ring.blocks(keys):
            part = sweep.forward(
                query,
                positive,
                block,
                scalar if temperature is None else temperature,
                options,
                ring.excluded(owner),
                compute_grad=need_query or need_positive or need_temperature,
            )
            total = part if total is None else _merged(total, part)
        assert total is not None
        if total.rank is not None:
            worst = sum(ring.counts) - len(keys) + worst_rank(len(keys), ring.period)
            total.rank.masked_fill_(total.loss.isnan(), worst)
            ctx.mark_non_differentiable(total.rank)
        ctx.save_for_backward(
            total.grad_query if need_query else None,
            total.grad_positive if need_positive else None,
            total.grad_scale if need_temperature else None,
            total.lse,
            query,
            positive,
            keys,
            temperature,
        )
        return total.loss, total.rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_query, grad_positive, grad_scale, lse, *inputs = ctx.saved_tensors
        query, _, keys, temperature = inputs
        ring: Ring = ctx.ring
        grads: list[Tensor | None] = [None] * 4
        with torch.no_grad():
            for i, grad in enumerate((grad_query, grad_positive)):
                if grad is not None:
                    grads[i] = (grad * grad_loss[:, None]).to(ctx.dtypes[i])
            if ctx.needs_input_grad[2]:

                def part(owner: int, block: Tensor) -> Tensor:
                    return sweep.grad_negatives(
                        grad_loss,
                        query,
                        block,
                        lse,
                        ctx.scalar if temperature is None else temperature,
                        ctx.options,
                        ring.excluded(owner),
                    )

                grads[2] = ring.collect(keys, part).to(ctx.dtypes[2])
            if grad_scale is not None:
                grads[3] = sweep.temperature_grad(grad_loss, grad_scale, temperature).to(
                    temperature.dtype
                )
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative("the loss on a ring", grads, (grad_loss, *inputs))
        return *grads, None, None, None


def _merged(a: InfoNCEForward, b: InfoNCEForward) -> InfoNCEForward:
    """Returns the losses and gradients against the negatives of both results."""
    loss = softplus(torch.logaddexp(_difference(a), _difference(b)))
    shares = [(result.loss - loss).exp() for result in (a, b)]

    def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None or second is None:
            return None
        one, other = (s[:, None] if first.dim() == 2 else s for s in shares)
        return first * one + second * other

    assert a.lse is not None
    return InfoNCEForward(
        loss,
        a.lse + (loss - a.loss),
        None if a.rank is None or b.rank is None else a.rank + b.rank,
        added(a.grad_query, b.grad_query),
        added(a.grad_positive, b.grad_positive),
        added(a.grad_scale, b.grad_scale),
    )


def _difference(result: InfoNCEForward) -> Tensor:
    """Returns d from the loss log(1 + e^d), without cancellation."""
    return result.loss + torch.log(-torch.expm1(-result.loss))
