"""Checks the enqueue kernel against a float64 loop, without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels.enqueue import enqueue_

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)


def _expected(queue: Tensor, pointer: int, keys: Tensor, normalize: bool) -> Tensor:
    queue, keys = queue.double(), keys.double()
    for i, key in enumerate(keys):
        if normalize:
            key = key / max(float(key.square().sum().sqrt()), 1e-12)
        queue[(pointer + i) % len(queue)] = key
    return queue


@settings(max_examples=25, deadline=None)
@given(
    # Queues of 1 row, a prime number of rows, and more rows than a program writes.
    K=st.sampled_from([1, 7, 64, 131]),
    # Fewer keys than rows, as many, and more keys than rows.
    B=st.sampled_from([0, 1, 7, 64, 150]),
    C=st.sampled_from([1, 5, 16, 130]),
    start=st.integers(0, 130),
    queue_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    keys_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    normalize=st.booleans(),
    transposed=st.booleans(),
)
def test_keys_land_where_a_loop_puts_them(
    K: int,
    B: int,
    C: int,
    start: int,
    queue_dtype: torch.dtype,
    keys_dtype: torch.dtype,
    normalize: bool,
    transposed: bool,
) -> None:
    generator = torch.Generator().manual_seed(K + B + C)
    queue = torch.randn(K, C, generator=generator).to(DEVICE, queue_dtype)
    keys = torch.randn(B, C, generator=generator).to(DEVICE, keys_dtype)
    if transposed:
        queue, keys = queue.T.contiguous().T, keys.T.contiguous().T
    pointer = torch.tensor([start % K], device=DEVICE)
    expected = _expected(queue, start % K, keys, normalize)
    enqueue_(queue, pointer, keys, normalize=normalize)
    assert pointer.item() == (start % K + B) % K
    # One rounding to the queue's type, and a few of float32 before it.
    eps = torch.finfo(queue_dtype).eps
    torch.testing.assert_close(queue.double(), expected, rtol=0.51 * eps + 1e-6, atol=1e-7)


def test_a_key_of_zeros_stays_zero_and_a_nan_stays_nan() -> None:
    queue, pointer = torch.ones(4, 3, device=DEVICE), torch.tensor([3], device=DEVICE)
    keys = torch.tensor([[0.0, 0.0, 0.0], [1.0, torch.nan, 0.0]], device=DEVICE)
    enqueue_(queue, pointer, keys, normalize=True)
    assert not queue[3].any()
    assert bool(queue[0].isnan().all())
    assert bool((queue[1:3] == 1).all())


def test_rows_between_the_keys_of_a_wider_buffer_are_left_alone() -> None:
    buffer = torch.zeros(10, 6, device=DEVICE)
    enqueue_(
        buffer[::2, 1:4],
        torch.tensor([4], device=DEVICE),
        torch.ones(2, 3, device=DEVICE),
        normalize=False,
    )
    expected = torch.zeros(10, 6, device=DEVICE)
    expected[8, 1:4] = expected[0, 1:4] = 1.0
    assert torch.equal(buffer, expected)


def test_rows_more_than_two_to_the_31_elements_into_the_ring() -> None:
    """Takes 600 rows at a distance of 4 M elements: 2.5e9 elements, pages of 4 rows touched."""
    distance = 2**22
    queue = torch.empty(600 * distance, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (600, 16), (distance, 1)
    )
    keys = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    enqueue_(queue, torch.tensor([596], device=DEVICE), keys, normalize=False)
    assert torch.equal(queue[596:], keys.bfloat16())


@pytest.mark.gpu
def test_a_cuda_graph_advances_the_ring_at_every_replay() -> None:
    queue, pointer = torch.zeros(5, 3, device="cuda"), torch.tensor([0], device="cuda")
    keys = torch.randn(2, 3, device="cuda")
    enqueue_(queue, pointer, keys, normalize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue_(queue, pointer, keys, normalize=True)
    assert pointer.item() == 2  # capturing ran nothing
    graph.replay()
    graph.replay()
    assert pointer.item() == 1
    expected = _expected(torch.zeros(5, 3, device="cuda"), 0, keys.repeat(3, 1), True)
    torch.testing.assert_close(queue.double(), expected, rtol=1e-6, atol=1e-7)
