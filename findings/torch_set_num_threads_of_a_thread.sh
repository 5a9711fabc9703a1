#!/usr/bin/env bash
# torch 2.11.0 (CPU, OpenMP): torch.set_num_threads(1) in one Python thread also sets the number of
# threads of every other Python thread that has not asked for its number yet, the main thread
# included. If the main thread has called torch.get_num_threads() before, it keeps its own number.
# A library that limits the threads of its workers can so slow the whole program, or not, depending
# on a getter that somebody called earlier.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11, 2 cores:
#   main thread asks after the worker: 1
#   main thread asks before and after the worker: 2, 2
# Needs two cores or more. The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 "numpy<2.4"
cat >"$folder/probe.py" <<'PYTHON'
import sys
import threading

import torch

numbers = [torch.get_num_threads()] if "before" in sys.argv else []
worker = threading.Thread(target=torch.set_num_threads, args=(1,))
worker.start()
worker.join()
numbers.append(torch.get_num_threads())
print(*numbers, sep=", ")
PYTHON
unset OMP_NUM_THREADS
after=$("$folder/venv/bin/python" "$folder/probe.py")
both=$("$folder/venv/bin/python" "$folder/probe.py" before)
echo "main thread asks after the worker: $after"
echo "main thread asks before and after the worker: $both"
[ "$after" = 1 ]
first=${both%%,*}
[ "$first" -gt 1 ] && [ "$both" = "$first, $first" ]
