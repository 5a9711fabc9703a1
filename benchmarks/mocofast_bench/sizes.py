"""Sizes at which kernels are compiled, predicted and measured. Does not import Triton."""

from __future__ import annotations

# {compute capability x 10: multiprocessors} of A100, RTX 4090, H200 and B200 (data sheets).
PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}
# {compute capability x 10: bytes of shared memory of a multiprocessor}
SHARED = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}


def weight_shapes() -> list[tuple[int, ...]]:
    """Returns the shapes of the parameters of MoCo v2's query encoder: 27,966,656 weights.

    The encoder is torchvision's ResNet-50 with a two-layer head.
    """
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inside, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inside = 4 * width
    return [*shapes, (2048, 2048), (2048,), (128, 2048), (128,)]
