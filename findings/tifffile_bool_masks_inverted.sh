#!/usr/bin/env bash
# tifffile 2026.3.3 writes an array of booleans as a 1-bit TIFF with photometric MinIsWhite (0).
# tifffile itself reads True back as True. Pillow 13.0.0, and every viewer that follows the tag,
# shows True as black and False as white: a mask looks inverted.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11:
#   photometric 0, 1 bit; tifffile reads True as True; Pillow shows True as 0 and False as 255
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

mask = np.zeros((16, 16), dtype=bool)
mask[4:12, 4:12] = True
file = io.BytesIO()
tifffile.imwrite(file, mask)
with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
    photometric, bits = int(tiff.pages[0].photometric), tiff.pages[0].bitspersample
read = tifffile.imread(io.BytesIO(file.getvalue()))
shown = np.asarray(Image.open(file).convert("L"))
print(f"photometric {photometric}, {bits} bit; tifffile reads True as {read[8, 8]}; "
      f"Pillow shows True as {shown[8, 8]} and False as {shown[0, 0]}")
assert (photometric, bits) == (0, 1) and np.array_equal(read, mask)
assert shown[8, 8] == 0 and shown[0, 0] == 255
PYTHON
