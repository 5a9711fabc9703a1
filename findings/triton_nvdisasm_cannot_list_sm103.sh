#!/usr/bin/env bash
# The wheel of Triton 3.6.0 compiles for sm_103 (B300), and the tools in the same wheel cannot list
# the code: ptxas-blackwell is of CUDA 12.9, nvdisasm and cuobjdump are of 12.8.
# `cuobjdump -res-usage` works for every architecture. Needs no GPU.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11:
#   sm_90: cuobjdump -sass 0, nvdisasm 0, cuobjdump -res-usage 0
#   sm_100: cuobjdump -sass 0, nvdisasm 0, cuobjdump -res-usage 0
#   sm_103: cuobjdump -sass 1, nvdisasm 1, cuobjdump -res-usage 0
#     nvdisasm fatal   : Cannot decode architecture 'SM103a'
#   sm_120: cuobjdump -sass 0, nvdisasm 0, cuobjdump -res-usage 0
# The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.6.0 setuptools "numpy<2.4"
cat >"$folder/list.py" <<'PYTHON'
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
seen = {}
for capability in (90, 100, 103, 120):
    source = ASTSource(add, signature, {"BLOCK": 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        codes, message = [], ""
        for tool in (("cuobjdump", "-sass"), ("nvdisasm",), ("cuobjdump", "-res-usage")):
            command = [TOOLS / tool[0], *tool[1:], file.name]
            done = subprocess.run(command, capture_output=True, text=True)
            codes.append(done.returncode)
            message = message or done.stderr.strip()
    seen[capability] = codes
    names = ("cuobjdump -sass", "nvdisasm", "cuobjdump -res-usage")
    print(f"sm_{capability}: " + ", ".join(f"{n} {c}" for n, c in zip(names, codes)))
    if message:
        print(f"  {message}")
assert seen == {90: [0, 0, 0], 100: [0, 0, 0], 103: [1, 1, 0], 120: [0, 0, 0]}, seen
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/list.py"
