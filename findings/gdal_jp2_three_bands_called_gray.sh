#!/usr/bin/env bash
# A JPEG 2000 file of three 8-bit bands, written without loss by GDAL's driver JP2OpenJPEG through
# rasterio (also with photometric="RGB"), says in its `colr` box that it is gray (enumerated colour
# space 17), although it holds three components. Only colour interpretations that are set before the
# pixels are written change the box to sRGB (16). Readers of valid files with 17 disagree:
# GDAL and imagecodecs return the three bands exactly. OpenCV 4.13 returns the first band three
# times, without a word. Pillow 13.0.0 opens the file as RGB, and raises "broken data stream" at the
# pixels.
#
# Seen on 2026-11-29, Linux x86_64, Python 3.11:
#   default: colour space 17, GDAL True, imagecodecs True, OpenCV first band only, Pillow OSError
#   photometric=RGB: the same
#   colorinterp first: colour space 16, GDAL True, imagecodecs True, OpenCV exact, Pillow exact
# The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
  rasterio==1.4.4 pillow==13.0.0 opencv-python-headless==4.13.0.92 \
  imagecodecs==2026.3.6 "numpy<2.4"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import cv2
import imagecodecs
import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

warnings.simplefilter("ignore")  # no georeference
bands = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
lossless = {"REVERSIBLE": "YES", "QUALITY": "100", "YCC": "NO"}
seen = {}
for way in ("default", "photometric=RGB", "colorinterp first"):
    name = f"{sys.argv[1]}/tile.jp2"
    options = lossless | ({"photometric": "RGB"} if way == "photometric=RGB" else {})
    with rasterio.open(name, "w", driver="JP2OpenJPEG", width=64, height=64, count=3,
                       dtype="uint8", **options) as file:
        if way == "colorinterp first":
            file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        file.write(bands)
    data = open(name, "rb").read()
    box = data.index(b"colr") + 4
    assert data[box] == 1  # an enumerated colour space follows two more bytes
    space = int.from_bytes(data[box + 3 : box + 7], "big")
    with rasterio.open(name) as file:
        gdal = np.array_equal(file.read(), bands)
    codec = np.array_equal(imagecodecs.imread(name).transpose(2, 0, 1), bands)
    colours = cv2.imread(name, cv2.IMREAD_COLOR).transpose(2, 0, 1)[::-1]
    first = np.array_equal(colours, np.stack([bands[0]] * 3))
    opencv = "exact" if np.array_equal(colours, bands) else "first band only" if first else "other"
    with Image.open(name) as image:
        assert image.mode == "RGB"
        try:
            exact = np.array_equal(np.asarray(image).transpose(2, 0, 1), bands)
            pillow = "exact" if exact else "other"
        except OSError:
            pillow = "OSError"
    seen[way] = (space, gdal, codec, opencv, pillow)
    print(f"{way}: colour space {space}, GDAL {gdal}, imagecodecs {codec}, OpenCV {opencv}, "
          f"Pillow {pillow}")
gray = (17, True, True, "first band only", "OSError")
assert seen == {
    "default": gray,
    "photometric=RGB": gray,
    "colorinterp first": (16, True, True, "exact", "exact"),
}, seen
PYTHON
