"""Lists the calls whose kernels `mocofast bench static` compiles.

All rows of the tile tables, in every variant that changes the code, and all small kernels.
InfoNCE has 256 queries and 65536 negatives, the sigmoid loss 4096 pairs. EMA and optimisers have
the 163 tensors of a ResNet-50 with MoCo v2's head, or one tensor of odd size. Ghost BatchNorm has
activations of ResNets for 256 images of 224 pixels, in 8 splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from mocofast_kernels.augment import NAMES, augment
from mocofast_kernels.configs import SPECIALISED, TENSOR_MEMORY, Tile
from mocofast_kernels.cpu_parts import ParameterRow
from mocofast_kernels.ema import ema_update_
from mocofast_kernels.enqueue import enqueue_
from mocofast_kernels.exclusion import Exclusion
from mocofast_kernels.ghost_bn import ghost_bn_backward, ghost_bn_forward
from mocofast_kernels.infonce import infonce_forward
from mocofast_kernels.infonce_backward import infonce_grad_negatives
from mocofast_kernels.optim import adamw_, lars_, sgd_
from mocofast_kernels.rows import dot_kind
from mocofast_kernels.sigmoid import sigmoid_forward, sigmoid_grad_negatives
from mocofast_kernels.tables import FLOATS
from mocofast_kernels.tiles import Products, forward_products
from torch import Tensor
from torch.nn.functional import normalize

from mocofast_bench.sizes import weight_shapes

N, K = 256, 65536  # queries and negatives


class Case(NamedTuple):
    """A call whose launches are compiled."""

    name: str
    call: Callable[[], object]
    matmul_precision: str = "highest"  # argument of torch.set_float32_matmul_precision
    capability: int | None = None  # the only compute capability x 10 that has the kernel


class Types(NamedTuple):
    """Types of a product."""

    name: str
    stored: torch.dtype  # of the inputs in memory
    dot: torch.dtype  # of the operands of matrix units
    matmul_precision: str = "highest"  # argument of torch.set_float32_matmul_precision


TYPES = (
    Types("bf16", torch.bfloat16, torch.bfloat16),
    Types("fp16", torch.float16, torch.float16),
    Types("fp32 as bf16", torch.float32, torch.bfloat16),
    Types("fp32 as fp16", torch.float32, torch.float16),
    Types("fp32 as tf32", torch.float32, torch.float32, "high"),
    Types("fp32", torch.float32, torch.float32),
)
# Every row of the tile tables: full blocks, partly filled blocks, several chunks, unaligned rows.
COLUMNS = (16, 32, 64, 101, 120, 128, 200, 256, 300, 512, 768, 1024)

LONG = (1152, 8192)  # CLIP's image features, and the longest row


class Variant(NamedTuple):
    """A variant of the forward sweep, named after the caller."""

    name: str
    normalize_negatives: bool
    compute_grad: bool
    online: bool  # the temperature is a tensor: the maximum of logits is found on the way
    exclude: bool  # leave out the own key among the negatives
    transposed: bool = False  # negatives with C as the slow dimension
    rank: bool = True  # return the positive ranks
    ids: bool = False  # leave out the negatives with the query's id
    mean: bool = False  # return the mean of the losses, not the losses


VARIANTS = (
    Variant("queue", False, True, False, False),
    Variant("queue, temperature tensor", False, True, True, False),
    Variant("queue, loss only", False, False, False, False),
    Variant("queue, transposed", False, True, True, False, transposed=True),
    Variant("queue, no ranks", False, True, False, False, rank=False),
    Variant("in-batch", True, True, True, True),
)
# Options of the queue and of in-batch negatives, at the default dimension alone.
WITH_OPTIONS = {
    "forward with mean": Variant("queue", False, True, False, False, mean=True),
    "forward with ids": Variant("queue", False, True, False, False, ids=True),
    "forward with ids and period": Variant("in-batch", True, True, True, True, ids=True),
}


class Problem(NamedTuple):
    """A product on given inputs."""

    products: Products  # what decides the tile
    run: Callable[[Tile | None], object]  # takes a tile. None: the tile of the table


def _rows(count: int, C: int, types: Types, device: str) -> Tensor:
    """Returns random unit vectors, (count, C). On the device "meta" no values exist."""
    return normalize(torch.randn(count, C, device=device), dim=1).to(types.stored)


def forward(
    C: int, types: Types, variant: Variant, device: str = "meta", n: int = N, k: int = K
) -> Problem:
    """Returns the forward sweep of n queries over k negatives."""
    query, positive, negatives = (_rows(count, C, types, device) for count in (n, n, k))
    if variant.transposed:
        negatives = negatives.T.contiguous().T
    temperature = torch.full((), 0.07, device=device) if variant.online else 0.07
    flags: dict[str, Any] = {
        "normalize": True,
        "normalize_negatives": variant.normalize_negatives,
        "dot_dtype": types.dot,
    }
    query_ids = key_ids = None
    if variant.ids:
        query_ids = torch.zeros(n, dtype=torch.int64, device=device)
        key_ids = torch.ones(k, dtype=torch.int64, device=device)
    run = partial(
        infonce_forward,
        query,
        positive,
        negatives,
        temperature,
        exclude_period=n if variant.exclude else 0,
        return_rank=variant.rank,
        compute_grad=variant.compute_grad,
        mean=variant.mean,
        query_ids=query_ids,
        key_ids=key_ids,
        **flags,
    )
    products = forward_products(negatives, temperature, ids=variant.ids, **flags)
    return Problem(products, lambda tile: run(tile=tile))


def grad_negatives(C: int, types: Types, device: str = "meta", n: int = N, k: int = K) -> Problem:
    """Returns the gradient of k negatives from n queries."""
    query, negatives = (_rows(count, C, types, device) for count in (n, k))
    row, temperature = torch.ones(n, device=device), torch.full((), 0.07, device=device)
    run = partial(
        infonce_grad_negatives,
        row,
        query,
        negatives,
        row,
        temperature,
        normalize=True,
        normalize_negatives=True,
        exclude_period=n,
        dot_dtype=types.dot,
    )
    kind = dot_kind(types.dot, torch.device(device))
    return Problem(Products("negatives", C, kind), lambda tile: run(tile=tile))


def _sigmoid(C: int, types: Types) -> Callable[[], object]:
    def call() -> None:
        image, text = (_rows(4096, C, types, "meta") for _ in range(2))
        number, row = torch.ones((), device="meta"), torch.ones(4096, device="meta")
        arguments = image, number, text, number, Exclusion(4096)
        sigmoid_forward(*arguments)
        sigmoid_grad_negatives(*arguments, row)

    return call


def _enqueue(C: int, types: Types) -> Callable[[], object]:
    def call() -> None:
        queue = torch.empty(K, C, dtype=types.stored, device="meta")
        pointer = torch.empty(1, dtype=torch.int64, device="meta")
        enqueue_(queue, pointer, torch.empty(N, C, device="meta"), normalize=True)

    return call


# Shapes of weights: wide loads fit a ResNet-50, and do not fit the odd size.
WEIGHTS: dict[str, list[tuple[int, ...]]] = {
    "ResNet-50": weight_shapes(),
    "odd size": [(3, 9_322_219)],
}


def _ema(target: torch.dtype, weights: str, momentum: float | Tensor) -> Callable[[], object]:
    def call() -> None:
        targets = [torch.empty(shape, dtype=target, device="meta") for shape in WEIGHTS[weights]]
        ema_update_(
            targets, [torch.empty(shape, device="meta") for shape in WEIGHTS[weights]], momentum
        )

    return call


def _optimizer(
    step: Callable[..., None],
    dtype: torch.dtype,
    weights: str,
    number: float | Tensor,
    averaged: bool,
) -> Callable[[], object]:
    def row(shape: tuple[int, ...]) -> ParameterRow:
        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        target, *shadows = (
            empty(kind) if averaged else None
            for kind in (torch.float32, torch.bfloat16, torch.bfloat16)
        )
        state: tuple[Tensor, ...] = (empty(dtype),)
        if step is adamw_:
            state = (empty(dtype), empty(dtype), torch.empty((), device="meta"))
        return ParameterRow(empty(dtype), empty(dtype), target, shadows[0], shadows[1], state)

    options: dict[str, Any] = {"lr": number, "weight_decay": 0.1, "ema_momentum": number}
    if step is adamw_:
        options |= {"betas": (0.9, 0.999), "eps": 1e-8}
    else:
        options |= {"momentum": 0.9, **({"trust_coefficient": 0.001} if step is lars_ else {})}
    return lambda: step([row(shape) for shape in WEIGHTS[weights]], **options)


def _ghost_bn(
    shape: tuple[int, int, int, int],
    num_splits: int,
    dtype: torch.dtype,
    relu: bool,
    residual: bool,
    running: bool,
) -> Callable[[], object]:
    def call() -> None:
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        row = torch.empty(shape[1], device="meta")
        statistics = (row, row) if running else (None, None)
        output = ghost_bn_forward(
            x,
            x if residual else None,
            row,
            row,
            *statistics,
            num_splits=num_splits,
            momentum=0.1,
            eps=1e-5,
            relu=relu,
        )
        y = output.output if relu and residual else None
        ghost_bn_backward(
            torch.empty_like(x), x, y, row, row, output.statistics, num_splits=num_splits, relu=relu
        )

    return call


# Shapes (N, C, H, W) of activations.
ACTIVATIONS = (
    (256, 64, 56, 56),
    (256, 2048, 7, 7),  # few rows
    (256, 48, 28, 28),  # masked columns
    (256, 13, 7, 7),  # unaligned rows
    (2**20, 64, 56, 56),  # row numbers need 64 bits
)


# (width = height of a view, rotation): digits, masked columns, CIFAR, the largest with and without.
VIEWS = ((8, True), (19, True), (32, True), (32, False), (64, False))


def _augment(size: int, rotate: bool) -> Callable[[], object]:
    def call() -> object:
        images = torch.empty(512, size, size, 3, dtype=torch.uint8, device="meta")
        index = torch.empty(512, dtype=torch.int64, device="meta")
        parameters = torch.empty(2, 512, len(NAMES), device="meta")  # two views of every image
        return augment(images, index, parameters, (size, size), rotate=rotate)

    return call


def cases() -> Iterator[Case]:
    """Yields all cases: all rows of the tile tables in all variants, and all small kernels."""
    # InfoNCE, then the queue.
    for C, types in itertools.product(COLUMNS, TYPES):
        variants = [("forward", variant) for variant in VARIANTS]
        for kind, variant in [*variants, *(WITH_OPTIONS.items() if C == 128 else ())]:
            name = f"{kind}, C={C}, {types.name}, {variant.name}"
            yield Case(name, partial(forward(C, types, variant).run, None), types.matmul_precision)
        name = f"backward, C={C}, {types.name}"
        yield Case(name, partial(grad_negatives(C, types).run, None), types.matmul_precision)
    for C, types in itertools.product(LONG, (TYPES[0], TYPES[-1])):
        name = f"forward, C={C}, {types.name}, in-batch"
        yield Case(name, partial(forward(C, types, VARIANTS[-1]).run, None))
        yield Case(f"backward, C={C}, {types.name}", partial(grad_negatives(C, types).run, None))
    for C, tiles in SPECIALISED.items():
        for tile, ranks in itertools.product(tiles, ("", ", no ranks")):
            problem = forward(C, TYPES[0], next(v for v in VARIANTS if v.name == f"queue{ranks}"))
            name = f"forward specialised by {tile.stream}, C={C}, bf16, queue{ranks}"
            yield Case(name, partial(problem.run, tile), capability=90)
            if C in TENSOR_MEMORY:
                name = f"forward specialised for sm_100, C={C}, bf16, queue{ranks}"
                yield Case(name, partial(problem.run, tile), capability=100)
    for C, types in itertools.product((64, 128, 200, 768), (TYPES[0], TYPES[1], TYPES[-1])):
        yield Case(f"sigmoid, C={C}, {types.name}", _sigmoid(C, types))
    for C in COLUMNS:
        yield Case(f"enqueue, C={C}, fp32", _enqueue(C, TYPES[-1]))
    # EMA and optimisers, with numbers from the host, or in float64 from the device (CUDA graphs).
    numbers = (0.1, torch.empty((), dtype=torch.float64, device="meta"))
    for target, weights, momentum in itertools.product(FLOATS, WEIGHTS, numbers):
        yield Case(
            f"ema, {target}, {weights}, {type(momentum).__name__} momentum",
            _ema(target, weights, momentum),
        )
    for step, dtype, weights, number, averaged in itertools.product(
        (sgd_, lars_, adamw_), FLOATS, WEIGHTS, numbers, (True, False)
    ):
        average = "with" if averaged else "without"
        name = f"{step.__name__}, {dtype}, {weights}, {type(number).__name__} lr, {average} EMA"
        yield Case(name, _optimizer(step, dtype, weights, number, averaged))
    # Ghost BatchNorm and augmentation.
    for shape, dtype, relu, residual in itertools.product(
        ACTIVATIONS, FLOATS, (False, True), (False, True)
    ):
        name = f"ghost_bn, {shape}, {dtype}{', residual' * residual}{', relu' * relu}"
        yield Case(name, _ghost_bn(shape, 8, dtype, relu, residual, running=True))
    yield Case(
        "ghost_bn, under torch.compile",
        _ghost_bn(ACTIVATIONS[0], 8, torch.bfloat16, False, False, False),
    )
    for size, rotate in VIEWS:
        yield Case(f"augment, {size} px{', rotated' * rotate}", _augment(size, rotate))
