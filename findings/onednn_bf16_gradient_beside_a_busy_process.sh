#!/usr/bin/env bash
# torch 2.11.0 (CPU with AVX512-BF16 and without AMX, oneDNN): beside a single busy process, the
# gradient of the weights of a first convolution (3 channels) in bfloat16 takes hundreds of
# milliseconds on two threads of two cores. Alone it takes less than 2 ms, and in float32 it takes
# some milliseconds beside the busy process. OMP_WAIT_POLICY=passive, which the script sets, does not
# help.
#
# Seen on 2026-11-30, Linux x86_64, Python 3.11, AMD EPYC (Zen 5), 2 cores, 32 images of 32 x 32
# pixels, 64 outputs, 3 x 3 kernel, channels-last:
#   1 thread: bfloat16 0.5 ms; 2 threads beside a busy process: bfloat16 388 ms, float32 8.0 ms
# The script runs on as many cores as threads, and fails if bfloat16 beside the busy process takes
# less than 20 times its time on one thread, or less than 5 times the time of float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 "numpy<2.4"
cat >"$folder/probe.py" <<'PYTHON'
import subprocess
import sys
import time

import torch


def milliseconds(dtype):
    x, w, g = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((32, 3, 32, 32), (64, 3, 3, 3), (32, 64, 32, 32))
    )
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        torch.ops.aten.convolution_backward(g, x, w, *options)
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[1:])[3]


if len(sys.argv) == 3:  # a process for every number of threads
    torch.set_num_threads(int(sys.argv[2]))
    print(milliseconds(getattr(torch, sys.argv[1])))
    sys.exit()


def measured(dtype, threads):
    command = [sys.executable, __file__, dtype, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


alone = measured("bfloat16", 1)
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    time.sleep(0.5)
    low, full = measured("bfloat16", 2), measured("float32", 2)
finally:
    busy.kill()
print(
    f"1 thread: bfloat16 {alone:.1f} ms; 2 threads beside a busy process: "
    f"bfloat16 {low:.0f} ms, float32 {full:.1f} ms"
)
assert low > 20 * alone, "bfloat16 on two threads took many times as long"
assert low > 5 * full, "bfloat16 took many times as long as float32"
PYTHON
OMP_WAIT_POLICY=passive taskset -c 0,1 "$folder/venv/bin/python" "$folder/probe.py"
