"""Implementations of InfoNCE: ours, eager PyTorch and other packages.

Every peer takes queries (N, C), positive keys (N, C) and negatives (K, C) of unit length, and
returns the mean loss over one positive and K negatives, differentiable in the queries.

A linear cross entropy has classes, but no positive key of every row. Cut-cross-entropy takes
the negatives as classes and returns a loss for every row: the term of the positive is added
afterwards. Liger computes the gradient in the forward pass, for the mean loss alone. There
the positive's logit becomes an additional coordinate of the query, read by an additional
class.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.errors import describe_error
from mocofast_bench import eager_formulas, timing
from mocofast_bench.timing import Call

TEMPERATURE = 0.2  # as in MoCo v2
MAX_SETS = 64  # most sets of inputs

Sizes = tuple[int, int, int]  # N, K, C
# query (N, C) that requires its gradient, positive (N, C), negatives (K, C)
Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(RuntimeError):
    """Says why a peer cannot run on the inputs."""


class Peer(NamedTuple):
    """An implementation of InfoNCE and its properties."""

    build: Callable[[Sizes, torch.dtype], Loss]  # takes sizes and dtype of the inputs
    dtype: torch.dtype | None = None  # dtype of the inputs. None: the dtype of the benchmark
    gpu_reason: str = ""  # why the peer needs a GPU, for a text before "GPUs only"
    compiles: bool = False  # compiles at the first call for every size
    waits: bool = False  # waits for the device: a CUDA graph cannot hold the call
    writes: bool = False  # writes into the negatives


def mocofast(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Our loss."""
    return lambda query, positive, negatives: ops.info_nce(
        query, positive, negatives, temperature=TEMPERATURE, negatives_normalized=True
    )


def with_rank(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Our loss, with the positive rank of every row."""
    return lambda query, positive, negatives: ops.info_nce(
        query,
        positive,
        negatives,
        temperature=TEMPERATURE,
        negatives_normalized=True,
        return_rank=True,
    )[0]


def eager(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """The eager formula of MoCo's paper, which writes N x (1 + K) logits."""
    return lambda query, positive, negatives: eager_formulas.info_nce(
        query, positive, negatives, TEMPERATURE
    )


def compiled(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """torch.compile of the eager formula, for the given sizes alone."""
    formula = torch.compile(eager_formulas.info_nce, dynamic=False)
    return lambda query, positive, negatives: formula(query, positive, negatives, TEMPERATURE)


def cut_cross_entropy(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Cut-cross-entropy's kernels (Wijmans et al. 2024, arXiv:2411.09009).

    The gradient filter is off. The filter drops blocks with probabilities below 2^-12. With
    many thousands of negatives nearly all blocks are below, and no gradient would remain.

    Raises Unavailable for float32.
    """
    if dtype == torch.float32:
        raise Unavailable("its backward kernel takes bfloat16 and float16 queries only")
    return _cut_cross_entropy("cce")


def cut_cross_entropy_compiled(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """Cut-cross-entropy by torch.compile, for machines that cannot run its kernels."""
    return _cut_cross_entropy("torch_compile")


def _cut_cross_entropy(implementation: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return _linear(partial(linear_cross_entropy, filter_eps=None, impl=implementation))


def _linear(cross_entropy: Callable[..., Tensor]) -> Loss:
    """Returns InfoNCE from a linear cross entropy with the negatives as classes.

    cross_entropy: takes inputs (N, C), weights (K, C), targets (N,) and reduction="none".
    """

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        scaled = F.normalize(query, dim=1) / TEMPERATURE
        wide = scaled.float()
        positive_logit = (wide * F.normalize(positive.float(), dim=1)).sum(1)
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        # Log-sum-exp over the negatives, minus the logit of class 0, the first negative.
        rest = cross_entropy(scaled, negatives, target, reduction="none")
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
        # Tensor cores need rows whose length is a multiple of 8.
        classes = F.pad(negatives, (0, 8, 0, 1))
        classes[size, dim] = 1.0
        return cross_entropy(
            classes, F.pad(torch.cat([scaled, positive_logit], dim=1), (0, 7)), target[0]
        )

    return loss


def torch_linear(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """PyTorch's linear cross entropy, which computes the logits in chunks.

    Raises Unavailable before PyTorch 2.13.
    """
    return _linear(linear_cross_entropy())


def linear_cross_entropy() -> Callable[..., Tensor]:
    """Returns PyTorch's linear cross entropy. Raises Unavailable before PyTorch 2.13."""
    function: Callable[..., Tensor] | None = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"needs torch 2.13 or newer, this is {torch.__version__}")
    return function


def lightly(sizes: Sizes, dtype: torch.dtype) -> Loss:
    """lightly's NTXentLoss with the negatives as memory bank.

    lightly clones the memory bank in every call and adds the keys.
    """
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(TEMPERATURE, sizes[1:])

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        criterion.memory_bank.bank = negatives
        return criterion(query, positive)

    return loss


OURS = {"mocofast": Peer(mocofast), "with rank": Peer(with_rank)}
OURS_IN_FLOAT32 = "mocofast float32"  # beside 16-bit inputs
BASELINE = {"eager": Peer(eager)}


def all_peers(dtype: torch.dtype, compiling: bool = True) -> dict[str, Peer]:
    """Returns {name: peer}.

    dtype: dtype of the benchmark. Eager peers run in a second dtype too, and our loss in float32.
    compiling: include peers with torch.compile.
    """
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    suffix = str(other).removeprefix("torch.")
    slow = "16-bit products are fast on"
    if dtype != torch.float32:
        slow = "the comparison between types is for"
    peers = {
        **OURS,
        **({OURS_IN_FLOAT32: Peer(mocofast, other)} if dtype != torch.float32 else {}),
        **BASELINE,
        f"eager {suffix}": Peer(eager, other, gpu_reason=slow),
        "torch.compile": Peer(compiled, compiles=True),
        f"torch.compile {suffix}": Peer(compiled, other, gpu_reason=slow, compiles=True),
        "cut-cross-entropy": Peer(
            cut_cross_entropy, gpu_reason="its Triton kernels run on", waits=True
        ),
        "cut-cross-entropy compiled": Peer(cut_cross_entropy_compiled, compiles=True, waits=True),
        "Liger": Peer(liger, gpu_reason="its Triton kernels run on", waits=True),
        "linear_cross_entropy": Peer(torch_linear, waits=True),
        "lightly": Peer(lightly, waits=True, writes=True),
    }
    return {name: peer for name, peer in peers.items() if compiling or not peer.compiles}


def prepare_calls(
    peers: dict[str, Peer], sizes: Sizes, dtype: torch.dtype, device: torch.device, sets: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Builds a forward and backward pass of every peer that runs here.

    sets: number of sets of inputs. Every call takes the next set.

    Returns:
        steps: {name: call}.
        skipped: {name: why the peer cannot run}.

    Errors of our peers and of the eager formula are raised, not skipped.
    """
    torch.compiler.reset()  # earlier sizes count against the limit of recompilations
    shared = input_sets(sizes, dtype, device, sets)
    steps, skipped = {}, {}
    for name, peer in peers.items():
        if peer.gpu_reason and device.type != "cuda":
            skipped[name] = f"{peer.gpu_reason} GPUs only"
            continue
        own = peer.writes or peer.dtype is not None
        try:
            loss = peer.build(sizes, peer.dtype or dtype)
            inputs = input_sets(sizes, peer.dtype or dtype, device, sets) if own else shared
            step = call_over(loss, inputs)
            step()
        except Unavailable as error:
            skipped[name] = str(error)
        except Exception as error:  # tool chains raise any type: the table goes on without the peer
            if name in OURS or name in BASELINE:
                raise
            skipped[name] = describe_error(error).splitlines()[0]
        else:
            steps[name] = step
    return steps, skipped


def call_over(loss: Loss, sets: Iterable[Inputs]) -> Call:
    """Returns a forward and backward pass on the next set of inputs."""
    turns = itertools.cycle(sets)

    def step() -> None:
        query, positive, negatives = next(turns)
        query.grad = None
        loss(query, positive, negatives).backward()

    return step


def input_sets(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, sets: int
) -> Sequence[Inputs]:
    """Returns random inputs with negatives of unit length, the same at every call."""
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
    """Returns how many sets of inputs exceed the last-level cache (MAX_SETS at most).

    A set has then left the cache before the benchmark uses the set again.
    """
    n, k, c = sizes
    return min(MAX_SETS, 2 + timing.cache_size(device) // ((2 * n + k) * c * dtype.itemsize))
