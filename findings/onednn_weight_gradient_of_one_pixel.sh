#!/usr/bin/env bash
# torch 2.11.0 (CPU, oneDNN without AVX-512): the gradient of the weights of a 3 x 3 convolution
# takes longer on images of 1 pixel than on images of 2 x 2 pixels, and 20 times as long as the
# result. Of the 9 taps of a kernel 1 sees the pixel. A ResNet for 224 pixels has images of 1 pixel
# in the last stage when the input has 32 pixels.
#
# Seen on 2026-11-30, Linux x86_64, Python 3.11, AMD EPYC (Zen 5), ONEDNN_MAX_CPU_ISA=AVX2, 1
# thread, 32 images of 512 channels, float32, channels-last:
#   1 x 1 pixels: result 1.8 ms, gradient of the weights 41.0 ms
#   2 x 2 pixels: result 5.0 ms, gradient of the weights 34.6 ms
# The script fails if the gradient of 1 pixel takes less than 8 results, or .7 of the gradient of
# 2 x 2 pixels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 "numpy<2.4"
cat >"$folder/probe.py" <<'PYTHON'
import time

import torch

torch.set_num_threads(1)


def milliseconds(call):
    call()
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[4]


def times(size):
    x, w, g = (
        torch.randn(shape).to(memory_format=torch.channels_last)
        for shape in ((32, 512, size, size), (512, 512, 3, 3), (32, 512, size, size))
    )
    result = milliseconds(lambda: torch.nn.functional.conv2d(x, w, padding=1))
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    gradient = milliseconds(lambda: torch.ops.aten.convolution_backward(g, x, w, *options))
    print(
        f"{size} x {size} pixels: result {result:.1f} ms, "
        f"gradient of the weights {gradient:.1f} ms"
    )
    return result, gradient


one, four = times(1), times(2)
assert one[1] > 0.7 * four[1], "a quarter of the pixels took about as long, or longer"
assert one[1] > 8 * one[0], "the gradient took many times as long as the result"
PYTHON
ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/probe.py"
