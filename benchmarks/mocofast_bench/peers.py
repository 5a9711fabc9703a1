"""Ways to the same InfoNCE, ours and other people's: each takes the query, the positive keys and unit negatives, and
returns the same mean loss over one positive and K negatives, differentiable with respect to the query.

A linear cross entropy knows classes, not a positive of each row's own. Cut-cross-entropy takes the negatives as its
classes and gets the positive's term added outside, which its per-row losses allow. Liger computes the gradient within
its forward pass for the mean loss only, so there the positive's logit is one more coordinate of the query, and one
more class reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.errors import describe_error
from mocofast_bench import eager_formulas, timing
from mocofast_bench.timing import Call

TEMPERATURE = 0.2  # MoCo v2's
MAX_SETS = 64  # of inputs

Sizes = tuple[int, int, int]  # N, K, C
Inputs = tuple[
    Tensor, Tensor, Tensor
]  # query (N, C) that requires its gradient, positive (N, C), negatives (K, C)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(RuntimeError):
    """Why a peer cannot run on such inputs."""


class Peer(NamedTuple):
    """How to get a loss, given sizes and type of its inputs, and what has to be known to run it."""

    build: Callable[[Sizes, torch.dtype], Loss]
    dtype: torch.dtype | None = None  # of its inputs, where not that of ours
    needs: str = ""  # what of it needs a GPU
    compiles: bool = False  # at the first call for every size
    waits: bool = False  # for the device, so that no CUDA graph can hold it
    writes: bool = False  # into its negatives


def mocofast(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Ours."""
    return lambda query, positive, negatives: ops.info_nce(
        query, positive, negatives, temperature=TEMPERATURE, negatives_normalized=True
    )


def with_rank(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Ours, with the positive's rank in every row."""
    return lambda query, positive, negatives: ops.info_nce(
        query,
        positive,
        negatives,
        temperature=TEMPERATURE,
        negatives_normalized=True,
        return_rank=True,
    )[0]


def eager(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """The reference's formula, with its N x (1 + K) logits."""
    return lambda query, positive, negatives: eager_formulas.info_nce(
        query, positive, negatives, TEMPERATURE
    )


def compiled(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """torch.compile of the reference's formula, for these sizes alone."""
    formula = torch.compile(eager_formulas.info_nce, dynamic=False)
    return lambda query, positive, negatives: formula(query, positive, negatives, TEMPERATURE)


def cut_cross_entropy(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Cut-cross-entropy's kernels (Wijmans et al. 2024, arXiv:2411.09009).

    Without its gradient filter: that drops blocks whose probabilities stay below 2^-12, as nearly all do among many
    thousands of negatives, and would leave no gradient of InfoNCE.
    """
    if dtype == torch.float32:
        raise Unavailable("its backward kernel takes bfloat16 and float16 queries only")
    return _cut_cross_entropy("cce")


def cut_cross_entropy_compiled(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Cut-cross-entropy's form for torch.compile, for machines that do not run its kernels."""
    return _cut_cross_entropy("torch_compile")


def _cut_cross_entropy(implementation: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        scaled = F.normalize(query, dim=1) / TEMPERATURE
        wide = scaled.float()
        positive_logit = (wide * F.normalize(positive.float(), dim=1)).sum(1)
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        # log-sum-exp over the negatives, less the logit of class 0, which is any of them
        rest = linear_cross_entropy(
            scaled, negatives, target, reduction="none", filter_eps=None, impl=implementation
        )
        return F.softplus(rest + wide @ negatives[0].float() - positive_logit).mean()

    return loss


def liger(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Liger-Kernel's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    count, size, dim = sizes
    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    target: list[Tensor] = []

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        if not target:
            target.append(torch.full((count,), size, device=query.device))
        scaled = F.normalize(query, dim=1) / TEMPERATURE
        positive_logit = (scaled * F.normalize(positive, dim=1)).sum(1, keepdim=True)
        # Rows stay multiples of 8 long, as tensor cores want them.
        classes = F.pad(negatives, (0, 8, 0, 1))
        classes[size, dim] = 1.0
        return cross_entropy(
            classes, F.pad(torch.cat([scaled, positive_logit], dim=1), (0, 7)), target[0]
        )

    return loss


def lightly(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """lightly's NTXentLoss with the negatives as its memory bank, which it clones, and to which it adds the keys."""
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(TEMPERATURE, sizes[1:])

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        criterion.memory_bank.bank = negatives
        return criterion(query, positive)

    return loss


OURS = {"mocofast": Peer(mocofast), "with rank": Peer(with_rank)}
BASELINE = {"eager": Peer(eager)}


def all_peers(dtype: torch.dtype, compiling: bool = True) -> dict[str, Peer]:
    """Every way by name; `compiling` includes those that torch.compile has to build first."""
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    suffix = str(other).removeprefix("torch.")
    slow = (
        "16-bit products are fast on"
        if dtype == torch.float32
        else "the comparison between types is for"
    )
    peers = {
        **OURS,
        **BASELINE,
        f"eager {suffix}": Peer(eager, other, needs=slow),
        "torch.compile": Peer(compiled, compiles=True),
        f"torch.compile {suffix}": Peer(compiled, other, needs=slow, compiles=True),
        "cut-cross-entropy": Peer(cut_cross_entropy, needs="its Triton kernels run on", waits=True),
        "cut-cross-entropy compiled": Peer(cut_cross_entropy_compiled, compiles=True, waits=True),
        "Liger": Peer(liger, needs="its Triton kernels run on", waits=True),
        "lightly": Peer(lightly, waits=True, writes=True),
    }
    return {name: peer for name, peer in peers.items() if compiling or not peer.compiles}


def prepare_calls(
    peers: dict[str, Peer], sizes: Sizes, dtype: torch.dtype, device: torch.device, sets: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """One forward and backward of every peer that runs here, each call on the next of `sets` sets of inputs; and, by
    name, why the others do not."""
    torch.compiler.reset()  # else earlier sizes count against its limit of recompilations
    shared = input_sets(sizes, dtype, device, sets)
    steps, skipped = {}, {}
    for name, peer in peers.items():
        if peer.needs and device.type != "cuda":
            skipped[name] = f"{peer.needs} GPUs only"
            continue
        own = peer.writes or peer.dtype is not None
        try:
            loss = peer.build(sizes, peer.dtype or dtype)
            step = call_over(
                loss, input_sets(sizes, peer.dtype or dtype, device, sets) if own else shared
            )
            step()
        except Unavailable as error:
            skipped[name] = str(error)
        except (
            Exception
        ) as error:  # whatever its tool chain raises, the other sides are still worth a table
            if name in OURS or name in BASELINE:
                raise
            skipped[name] = describe_error(error).splitlines()[0]
        else:
            steps[name] = step
    return steps, skipped


def call_over(loss: Loss, sets: Iterable[Inputs]) -> Call:
    """One forward and backward on the next set of inputs, over and over."""
    turns = itertools.cycle(sets)

    def step() -> None:
        query, positive, negatives = next(turns)
        query.grad = None
        loss(query, positive, negatives).backward()

    return step


def input_sets(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, sets: int
) -> Sequence[Inputs]:
    """Random inputs, the negatives of unit length, the same at every call."""
    n, k, c = sizes
    generator = torch.Generator(device).manual_seed(0)
    result = []
    for _ in range(sets):
        query, positive, negatives = (
            torch.randn(rows, c, generator=generator, device=device) for rows in (n, n, k)
        )
        negatives = F.normalize(negatives).to(dtype)
        result.append((query.to(dtype).requires_grad_(), positive.to(dtype), negatives))
    return result


def sets_past_the_cache(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """So many sets of inputs that the last-level cache has lost one before its turn comes again (64 at most)."""
    n, k, c = sizes
    return min(MAX_SETS, 2 + timing.cache_size(device) // ((2 * n + k) * c * dtype.itemsize))
