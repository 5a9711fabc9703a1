"""Files of many kinds, written with the libraries of their fields, and what an encoder should see.

Every file is made from the same smooth picture. `KINDS` names the kinds. The tests and
the generator of docs/formats.md write the files to a folder.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

H, W = 40, 56
_Y, _X = np.mgrid[0:H, 0:W] / np.array([H - 1, W - 1]).reshape(2, 1, 1)
GRAY = 0.1 + 0.6 * _X + 0.25 * np.exp(-((_X - 0.4) ** 2 + (_Y - 0.3) ** 2) / 0.02)  # (H, W)
RGB = np.stack([GRAY, 0.2 + 0.5 * _Y + 0.2 * _X, 0.9 - 0.4 * _X * _Y - 0.2 * _Y], axis=2)


def levels(picture: np.ndarray, top: float) -> np.ndarray:
    """Returns the picture in whole numbers from 0 to `top`, as float64."""
    return np.rint(picture * top)


def gray(values: np.ndarray) -> np.ndarray:
    """Returns values (H, W) as (H, W, 3)."""
    return np.repeat(values[..., None], 3, axis=2)


def stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns values scaled from [low, high] to [0, 255], (H, W, 3)."""
    return gray(np.clip((values - low) / (high - low), 0, 1) * 255)


class Kind(NamedTuple):
    """A kind of file."""

    group: str  # the row of docs/formats.md
    name: str  # of the file
    write: Callable[[Path], object]
    expected: np.ndarray  # (H, W, 3) float64, 0 to 255: what the encoder should see
    tolerance: float = 1.0  # largest difference from `expected`
    remark: str = ""  # words of the remark that the header gives


G8, C8 = levels(GRAY, 255).astype(np.uint8), levels(RGB, 255).astype(np.uint8)
G16, C16 = levels(GRAY, 65535).astype(np.uint16), levels(RGB, 65535).astype(np.uint16)
ALPHA = levels(0.2 + 0.8 * _Y, 255).astype(np.uint8)
HOUNSFIELD = levels(-700 + 1400 * GRAY, 1).astype(np.int16)
HEIGHT = (100 + 900 * GRAY).astype(np.float32)
HOLE = (_X > 0.7) & (_Y > 0.7)
FILLED = np.where(HOLE, HEIGHT[~HOLE].mean(), HEIGHT)
STACK = np.stack([(G8 * share).astype(np.uint8) for share in (0, 0.3, 0.6, 1, 0.6, 0.3, 0)])
FLUOR = np.stack([G16, C16[..., 1], C16[..., 2], G16 // 2, G16 // 3])
BANDS = np.stack([levels(500 + 3000 * (GRAY + i / 13) / 2, 1) for i in range(13)], axis=2)
BANDS16 = BANDS.astype(np.uint16)


def _pil(pixels: np.ndarray | Image.Image, **options: Any) -> Callable[[Path], object]:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return lambda path: image.save(path, **options)


def _tiff(pixels: np.ndarray, **options: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import tifffile

        tifffile.imwrite(path, pixels, **options)

    return write


def _codec(name: str, pixels: np.ndarray, **options: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import imagecodecs

        path.write_bytes(getattr(imagecodecs, f"{name}_encode")(pixels, **options))

    return write


def _pnm(header: str, pixels: np.ndarray) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(header.encode() + pixels.tobytes())


def _ascii(header: str, pixels: np.ndarray) -> Callable[[Path], object]:
    lines = "\n".join(" ".join(map(str, row)) for row in pixels.reshape(H, -1).tolist())
    return lambda path: path.write_text(f"{header}{lines}\n")


def _premultiplied() -> np.ndarray:
    color = np.rint(C8 * (ALPHA[..., None] / 255)).astype(np.uint8)
    return np.dstack([color, ALPHA])


def _pyramid(path: Path) -> None:
    import tifffile

    with tifffile.TiffWriter(path) as out:
        out.write(C8, photometric="rgb", tile=(16, 16))
        out.write(C8[::2, ::2], photometric="rgb", tile=(16, 16), subfiletype=1)


def _gif(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(G8).save(buffer, "GIF")
    path.write_bytes(buffer.getvalue())


def _webp_frames(path: Path) -> None:
    first = Image.fromarray(C8)
    first.save(path, save_all=True, append_images=[Image.new("RGB", (W, H))], lossless=True)


def _png_frames(path: Path) -> None:
    Image.fromarray(C8).save(path, save_all=True, append_images=[Image.new("RGB", (W, H))])


def _lab() -> tuple[Image.Image, np.ndarray]:
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.createProfile("LAB")
    pixels = levels(0.5 + 0.4 * (RGB - 0.5), 255).astype(np.uint8)  # no colour outside of sRGB
    image = Image.fromarray(pixels)
    there = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert there is not None
    return there, pixels.astype(float)


TURN = {3: 2, 6: -1, 8: 1}  # orientation: quarter turns that set the stored picture upright
ONE_BIT = np.where(GRAY > 0.5, 255, 0).astype(np.uint8)
PALETTE = Image.fromarray(C8).quantize(64)
SEEN_PALETTE = np.asarray(PALETTE.convert("RGB")).astype(float)
CMYK = Image.fromarray(C8).convert("CMYK")
WHITE = 255.0 - G8
F8, F3 = gray(G8.astype(float)), C8.astype(float)

KINDS = (
    # 8 bits, in the formats of photos
    Kind("JPEG", "rgb.jpg", _pil(C8, quality=98, subsampling=0), F3, 8),
    Kind("JPEG", "progressive.jpg", _pil(C8, quality=98, subsampling=0, progressive=True), F3, 8),
    Kind("JPEG", "gray.jpg", _pil(G8, quality=98), F8, 8),
    Kind("JPEG", "cmyk.jpg", _pil(CMYK, quality=98), F3, 8),
    Kind("PNG, 8 bits and less", "rgb.png", _pil(C8), F3, 0),
    Kind("PNG, 8 bits and less", "gray.png", _pil(G8), F8, 0),
    Kind("PNG, 8 bits and less", "one-bit.png", _pil(Image.fromarray(ONE_BIT).convert("1")),
         gray(ONE_BIT.astype(float)), 0),
    Kind("PNG, 8 bits and less", "palette.png", _pil(PALETTE), SEEN_PALETTE, 0),
    Kind("PNG, 8 bits and less", "alpha.png", _pil(np.dstack([C8, ALPHA])), F3, 0),
    Kind("PNG, 8 bits and less", "gray-alpha.png", _pil(np.dstack([G8, ALPHA])), F8, 0),
    Kind("PNG, animated", "frames.png", _png_frames, F3, 0),
    Kind("PNG, 16 bits", "gray16.png", _pil(G16), stretched(G16, 0, 65535)),
    Kind("PNG, 16 bits", "rgb16.png", _codec("png", C16), C16 / 257),
    Kind("BMP", "rgb.bmp", _pil(C8), F3, 0),
    Kind("BMP", "gray.bmp", _pil(G8), F8, 0),
    Kind("BMP", "palette.bmp", _pil(PALETTE), SEEN_PALETTE, 0),
    Kind("BMP", "alpha.bmp", _pil(np.dstack([C8, ALPHA])), F3, 0),
    Kind("BMP", "one-bit.bmp", _pil(Image.fromarray(ONE_BIT).convert("1")),
         gray(ONE_BIT.astype(float)), 0),
    Kind("WebP", "rgb.webp", _pil(C8, lossless=True), F3, 0),
    Kind("WebP", "alpha.webp", _pil(np.dstack([C8, ALPHA]), lossless=True, exact=True), F3, 0),
    Kind("WebP, animated", "frames.webp", _webp_frames, F3, 0),
    Kind("a GIF with the name of a PNG", "gif.png", _gif, F8, 0),
    # PNM
    Kind("PGM and PPM, maxval 255", "gray.pgm", _pil(G8), F8, 0),
    Kind("PGM and PPM, maxval 255", "rgb.ppm", _pil(C8), F3, 0),
    Kind("PGM and PPM, other maxval", "m100.pgm",
         _pnm(f"P5 {W} {H} 100\n", levels(GRAY, 100).astype(np.uint8)),
         stretched(levels(GRAY, 100), 0, 100)),
    Kind("PGM and PPM, other maxval", "m1023.pgm",
         _pnm(f"P5 {W} {H} 1023\n", levels(GRAY, 1023).astype(">u2")),
         stretched(levels(GRAY, 1023), 0, 1023)),
    Kind("PGM and PPM, other maxval", "m4095.pgm",
         _pnm(f"P5\n# 12 bits\n{W} {H}\n4095\n", levels(GRAY, 4095).astype(">u2")),
         stretched(levels(GRAY, 4095), 0, 4095)),
    Kind("PGM and PPM, other maxval", "m4095.ppm",
         _pnm(f"P6 {W} {H} 4095\n", levels(RGB, 4095).astype(">u2")),
         levels(RGB, 4095) / 4095 * 255),
    Kind("PGM and PPM, other maxval", "m65535.pgm",
         _pnm(f"P5 {W} {H} 65535\n", G16.astype(">u2")), stretched(G16, 0, 65535)),
    Kind("PGM and PPM, ASCII", "ascii.pgm", _ascii(f"P2 {W} {H} 255\n", G8), F8, 0),
    Kind("PGM and PPM, ASCII", "ascii.ppm", _ascii(f"P3 {W} {H} 255\n", C8), F3, 0),
    Kind("PBM", "one-bit.pbm", _pil(Image.fromarray(ONE_BIT).convert("1")),
         gray(ONE_BIT.astype(float)), 0),
    # JPEG 2000
    Kind("JPEG 2000, 8 bits", "rgb.jp2", _pil(C8), F3, 0),
    Kind("JPEG 2000, 8 bits", "gray.jp2", _pil(G8), F8, 0),
    Kind("JPEG 2000, 8 bits", "rgb.j2k", _pil(C8), F3, 0),
    Kind("JPEG 2000, 8 bits", "gray.j2k", _pil(G8), F8, 0),
    Kind("JPEG 2000, more bits", "gray12.jp2",
         _codec("jpeg2k", levels(GRAY, 4095).astype(np.uint16), bitspersample=12, codecformat="jp2",
                level=0), stretched(levels(GRAY, 4095), 0, 4095)),
    Kind("JPEG 2000, more bits", "gray16.j2k",
         _codec("jpeg2k", G16, codecformat="j2k", level=0), stretched(G16, 0, 65535)),
    Kind("JPEG 2000, more bits", "rgb12.jp2",
         _codec("jpeg2k", levels(RGB, 4095).astype(np.uint16), bitspersample=12, codecformat="jp2",
                level=0), levels(RGB, 4095) / 4095 * 255, 1.5),  # PIL cuts 4 bits off
    # TIFF of 8 bits
    Kind("TIFF, 8 bits", "gray.tif", _pil(G8), F8, 0),
    Kind("TIFF, 8 bits", "rgb.tif", _pil(C8), F3, 0),
    Kind("TIFF, 8 bits", "lzw.tif", _pil(C8, compression="tiff_lzw"), F3, 0),
    Kind("TIFF, 8 bits", "deflate.tif", _tiff(C8, compression="zlib", predictor=True), F3, 0),
    Kind("TIFF, 8 bits", "packbits.tif", _pil(C8, compression="packbits"), F3, 0),
    Kind("TIFF, 8 bits", "tiled.tif", _tiff(C8, tile=(16, 16)), F3, 0),
    Kind("TIFF, 8 bits", "big.tif", _tiff(C8, bigtiff=True), F3, 0),
    Kind("TIFF, 8 bits", "motorola.tif", _tiff(C8, byteorder=">"), F3, 0),
    Kind("TIFF, 8 bits", "palette.tif", _pil(PALETTE), SEEN_PALETTE),
    Kind("TIFF, 8 bits", "cmyk.tif", _pil(CMYK), F3),
    Kind("TIFF, 8 bits", "pyramid.tif", _pyramid, F3, 0),
    Kind("TIFF, 8 bits", "planar.tif",
         _tiff(np.moveaxis(C8, 2, 0), photometric="rgb", planarconfig="separate"), F3, 0),
    Kind("TIFF, 8 bits", "jpeg.tif", _pil(C8, compression="jpeg", quality=98), F3, 10),
    Kind("TIFF, 8 bits", "zstd.tif", _tiff(C8, compression="zstd"), F3, 0),
    Kind("TIFF, rare compressions", "lzma.tif", _tiff(G8, compression="lzma"), F8, 0),
    Kind("TIFF, rare compressions", "jpeg2000.tif", _tiff(C8, compression="jpeg2000"), F3, 0),
    Kind("TIFF, rare compressions", "lerc.tif",
         _tiff(GRAY.astype(np.float32), compression="lerc"), gray(GRAY * 255)),
    Kind("TIFF, 1 bit", "fax.tif",
         _pil(Image.fromarray(ONE_BIT).convert("1"), compression="group4"),
         gray(ONE_BIT.astype(float)), 0),
    Kind("TIFF, white is zero", "white8.tif", _tiff(G8, photometric="miniswhite"), gray(WHITE), 0),
    Kind("TIFF, white is zero", "white16.tif", _tiff(G16, photometric="miniswhite"),
         stretched(65535.0 - G16, 0, 65535)),
    Kind("TIFF, alpha", "alpha.tif",
         _tiff(np.dstack([C8, ALPHA]), photometric="rgb", extrasamples=["unassalpha"]), F3, 0),
    # Dividing by a small alpha gives the colour to 255 / alpha.
    Kind("TIFF, alpha", "associated.tif",
         _tiff(_premultiplied(), photometric="rgb", extrasamples=["assocalpha"]), F3, 4),
    Kind("TIFF, alpha", "gray-alpha.tif",
         _tiff(np.dstack([G8, ALPHA]), photometric="minisblack", extrasamples=["unassalpha"]), F8,
         0),
    Kind("TIFF, CIELAB", "lab.tif", _pil(_lab()[0]), _lab()[1], 6),
    *(Kind("TIFF, orientation", f"turned{tag}.tif",
           _tiff(np.rot90(C8, -turns), extratags=[(274, 3, 1, tag, True)]), F3, 0)
      for tag, turns in TURN.items()),
    # TIFF of other numbers
    Kind("TIFF, 16 bits", "gray16.tif", _tiff(G16), stretched(G16, 0, 65535)),
    Kind("TIFF, 16 bits", "rgb16.tif", _tiff(C16, photometric="rgb"), C16 / 257),
    Kind("TIFF, 16 bits", "planar16.tif",
         _tiff(np.moveaxis(C16, 2, 0), photometric="rgb", planarconfig="separate"), C16 / 257),
    Kind("TIFF, 16 bits", "bands3.tif", _tiff(C16, photometric="minisblack", planarconfig="contig"),
         C16 / 257),
    Kind("TIFF, float in [0, 1]", "float01.tif", _tiff(GRAY.astype(np.float32)), GRAY[..., None] *
         np.full(3, 255.0)),
    Kind("TIFF, float in [0, 1]", "double01.tif", _tiff(GRAY), gray(GRAY * 255)),
    Kind("TIFF, float in [0, 1]", "half01.tif", _tiff(GRAY.astype(np.float16)), gray(GRAY * 255)),
    Kind("TIFF, float in [0, 1]", "float01-rgb.tif", _tiff(RGB.astype(np.float32),
         photometric="rgb"), RGB * 255),
    Kind("TIFF, float in [0, 255]", "float255.tif", _tiff((GRAY * 255).astype(np.float32)),
         gray(GRAY * 255)),
    Kind("TIFF, heights", "height.tif", _tiff(HEIGHT), stretched(HEIGHT, HEIGHT.min(),
         HEIGHT.max())),
    Kind("TIFF, heights", "nodata.tif",
         _tiff(np.where(HOLE, np.float32(-9999), HEIGHT), extratags=[(42113, 2, 0, "-9999", True)]),
         stretched(FILLED, HEIGHT[~HOLE].min(), HEIGHT[~HOLE].max())),
    Kind("TIFF, heights", "nan.tif", _tiff(np.where(HOLE, np.float32(np.nan), HEIGHT)),
         stretched(FILLED, HEIGHT[~HOLE].min(), HEIGHT[~HOLE].max())),
    Kind("TIFF, signed or 32 bits", "int16.tif", _tiff(HOUNSFIELD),
         stretched(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max())),
    Kind("TIFF, signed or 32 bits", "int8.tif", _tiff((G8.astype(np.int16) - 128).astype(np.int8)),
         F8, 0),
    Kind("TIFF, signed or 32 bits", "uint32.tif", _tiff(levels(GRAY, 10**6).astype(np.uint32)),
         stretched(GRAY, GRAY.min(), GRAY.max())),
    Kind("TIFF, signed or 32 bits", "int32.tif", _tiff(HOUNSFIELD.astype(np.int32)),
         stretched(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max())),
    Kind("TIFF, two channels", "two8.tif", _tiff(np.dstack([G8, ALPHA]), photometric="minisblack",
         planarconfig="contig"), F8, 0, "channel 1 of 2"),
    Kind("TIFF, two channels", "two-float.tif",
         _tiff(np.dstack([GRAY, _Y]).astype(np.float32), photometric="minisblack",
               planarconfig="contig"), gray(GRAY * 255), 1, "channel 1 of 2"),
    Kind("TIFF, more channels", "bands13.tif",
         _tiff(BANDS16, photometric="minisblack", planarconfig="contig"), BANDS[..., :3] / 257, 1,
         "channels 1 to 3 of 13"),
    Kind("TIFF, more channels", "near-infrared.tif",
         _tiff(np.dstack([C8, G8]), photometric="rgb", extrasamples=["unspecified"]), F3, 0,
         "channels 1 to 3 of 4"),
    Kind("OME-TIFF", "channels.ome.tif", _tiff(FLUOR, metadata={"axes": "CYX"}),
         np.moveaxis(FLUOR[:3], 0, 2) / 257, 1, "channels 1 to 3 of 5"),
    Kind("ImageJ stack", "imagej.tif",
         _tiff(FLUOR, imagej=True, metadata={"axes": "CYX"}),
         np.moveaxis(FLUOR[:3], 0, 2) / 257, 1, "channels 1 to 3 of 5"),
    Kind("TIFF, stack of pages", "stack.tif", _tiff(STACK, photometric="minisblack"), F8, 0,
         "page 4 of 7"),
    Kind("TIFF, stack of pages", "imagej-stack.tif",
         _tiff(STACK, imagej=True, metadata={"axes": "ZYX"}), F8, 0, "page 4 of 7"),
)  # fmt: skip
