"""Sizes that kernels are compiled for, predicted and measured at. Without Triton."""

from __future__ import annotations

# Multiprocessors, by compute capability, of the GPU whose launches are recorded: A100, H200 and B200 (their data
# sheets).
PROCESSORS = {80: 108, 90: 132, 100: 148}


def weight_shapes() -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50's parameters (torchvision's) with the two-layer head of MoCo v2: 27,966,656 weights."""
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
