#!/usr/bin/env bash
# torch 2.11.0 (CPU): F.interpolate(..., antialias=True) to a width of 1 repeats the first row of the
# result in all rows, without an error. A height of 1 is right, and so is the same call without
# antialias. float32, float64, and uint8 of 5 or more channels are wrong, in both memory formats.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11:
#   8 x 8 ramp to 4 x 1, antialias: [9.2143, 9.2143, 9.2143, 9.2143]
#   the transposed ramp to 1 x 4:   [9.2143, 23.5, 39.5, 53.7857]
#   without antialias, 4 x 1:       [7.5, 23.5, 39.5, 55.5]
# The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 "numpy<2.4"
cat >"$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F

ramp = torch.arange(64.0).view(1, 1, 8, 8)


def resized(image, shape, antialias):
    rows = F.interpolate(image, shape, mode="bilinear", antialias=antialias)
    return [round(value, 4) for value in rows.flatten().tolist()]


wide, tall = resized(ramp, (4, 1), True), resized(ramp.mT.contiguous(), (1, 4), True)
print("8 x 8 ramp to 4 x 1, antialias:", wide)
print("the transposed ramp to 1 x 4:  ", tall)
print("without antialias, 4 x 1:      ", resized(ramp, (4, 1), False))
assert len(set(wide)) == 1, "all rows were equal"
assert len(set(tall)) == 4, "the transposed ramp was right"
PYTHON
"$folder/venv/bin/python" "$folder/probe.py"
