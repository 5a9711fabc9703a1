#!/usr/bin/env bash
# Pillow 13.0.0 opens a TIFF of 16-bit RGB in separate planes without an error or a warning, and the
# pixels are wrong by up to 234 of 255. The same picture with interleaved channels is right (the
# upper 8 bits). tifffile 2026.3.3 reads both files exactly.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11:
#   contig: tifffile exact True, Pillow differs from the upper 8 bits by at most 0
#   separate: tifffile exact True, Pillow differs from the upper 8 bits by at most 234
# The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 tifffile==2026.3.3 "numpy<2.4"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import tifffile
from PIL import Image

y, x = np.mgrid[0:32, 0:48]
picture = np.stack([x * 1300, y * 2000, (x + y) * 800], -1).astype(np.uint16)  # (32, 48, 3)
worst = {}
for layout in ("contig", "separate"):
    planes = picture if layout == "contig" else np.moveaxis(picture, -1, 0)
    file = io.BytesIO()
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig=layout)
    exact = np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), planes)
    assert exact
    seen = np.asarray(Image.open(file).convert("RGB")).astype(int)
    worst[layout] = int(np.abs(seen - (picture >> 8)).max())
    print(f"{layout}: tifffile exact {exact}, "
          f"Pillow differs from the upper 8 bits by at most {worst[layout]}")
assert worst == {"contig": 0, "separate": 234}, worst
PYTHON
