"""Tiles of products: from a table that `mocofast bench autotune` measured, else by the rule.

The table is a JSON file. The environment variable MOCOFAST_TILES names the file. Without the
variable the file is `$XDG_CACHE_HOME/mocofast/tiles-<GPU>.json` (`~/.cache` without
XDG_CACHE_HOME), if it exists. A process reads the file once.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from mocofast_kernels.configs import (
    LONGEST,
    SPECIALISED,
    TENSOR_MEMORY,
    Architecture,
    Tile,
    architecture,
    backward_tile,
    block_of,
    forward_tile,
)
from mocofast_kernels.rows import dot_kind

VARIABLE = "MOCOFAST_TILES"
FORMAT = 1


class Products(NamedTuple):
    """Properties that decide a tile. `configs.forward_tile` documents dot and the flags."""

    kernel: str  # "forward", or "negatives" for the gradient by the negatives
    C: int
    dot: str
    aligned: bool = True
    plain: bool = True
    online: bool = False


TileTable = dict[Products, Tile]


def forward_products(
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    dot_dtype: torch.dtype,
    ids: bool = False,
) -> Products:
    """Returns the properties that decide the tile of `infonce_forward`.

    ids: ids are compared. Further arguments: as for `infonce_forward`.
    """
    C = negatives.shape[1]
    aligned = C % 8 == 0 and negatives.stride(1) == 1 and negatives.stride(0) % 8 == 0
    # Ids take registers, so the sweep gets the tile of negatives that pass through registers.
    plain = aligned and negatives.dtype == dot_dtype and not normalize_negatives and not ids
    # Scores of unit vectors lie in [-1, 1], so the largest logit is known: 1/T. Probabilities
    # relative to this logit reach down to e^(-2/T), which float32 and bfloat16 hold, and float16
    # does not. With normalize and without normalize_negatives, the negatives are unit vectors
    # already (the queue).
    online = not normalize or isinstance(temperature, Tensor) or 2.0 / temperature >= 80.0
    online = online or dot_dtype == torch.float16
    return Products("forward", C, dot_kind(dot_dtype, negatives.device), aligned, plain, online)


def rule(products: Products, gpu: Architecture = Architecture()) -> Tile:  # noqa: B008
    """Returns the tile chosen by the rule, without a table."""
    kernel, C, dot, aligned, plain, online = products
    if kernel == "forward":
        return forward_tile(C, dot, aligned, plain, online, gpu)
    return backward_tile(C, dot)


def tile_of(products: Products, device: torch.device) -> Tile:
    """Returns the tile for a launch on a device.

    Raises ValueError for an unusable table.
    """
    tile = table(device).get(products)
    return rule(products, architecture(device)) if tile is None else tile


def path_of(device: torch.device) -> Path | None:
    """Returns where the table of a device may lie. None: the device has no table."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    if device.type != "cuda":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return base / "mocofast" / f"tiles-{name}.json"


@functools.cache
def table(device: torch.device) -> TileTable:
    """Returns the table of a device, or an empty table.

    Raises ValueError where MOCOFAST_TILES names a file that does not exist.
    """
    path = path_of(device)
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return {}
    return load(path, capability_of(device))


def capability_of(device: torch.device) -> int | None:
    """Returns a GPU's compute capability times 10, for instance 80, or None for other devices."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def load(path: Path, capability: int | None) -> TileTable:
    """Reads a table from a file.

    capability: compute capability times 10 that the table must be made for. None accepts any.

    Raises ValueError, with the file and the fault, for a table of another compute capability and
    for a row unusable by the kernels.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read a table of tiles: {error}") from None
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("tiles"), list)
    ):
        raise ValueError(
            f"{path}: expected a table of tiles with format {FORMAT} and a list of tiles"
        )
    if capability is not None and content.get("capability") != capability:
        raise ValueError(
            f"{path}: made for compute capability {content.get('capability')}, "
            f"this GPU has {capability}"
        )
    result = {}
    for number, row in enumerate(content["tiles"]):
        try:
            products = Products(**row["products"])
            tile = Tile(**row["tile"])
            check(products, tile)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: row {number} of the tiles: {error}. Run mocofast bench autotune again."
            ) from None
        result[products] = tile
    return result


def check(products: Products, tile: Tile) -> None:
    """Raises ValueError unless the kernels compute correctly with this tile."""
    for (name, kind), value in zip(get_type_hints(Products).items(), products):
        if type(value) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}: got {value!r}")
    kernels, dots = ("forward", "negatives"), ("16bit", "tf32", "ieee")
    if products.kernel not in kernels or products.dot not in dots:
        raise ValueError(f"unknown kernel or kind of product: {products}")
    if not 1 <= products.C <= LONGEST:
        raise ValueError(f"C must be in 1 to {LONGEST}: got {products.C}")
    if tile.specialised:
        if not can_specialise(products) or tile not in SPECIALISED[products.C]:
            raise ValueError(f"no warp-specialised sweep is {tile} for {products}")
        return
    # Sides of a matrix product are powers of two from 16. Offsets of 32 bits allow 256 rows.
    longest = block_of(products.C)
    limits = {
        "stay": (16, 256),
        "stream": (16, 256),
        "block_c": (16, longest),
        "out_c": (16, longest),
        "warps": (1, 16),
    }
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        if type(value) is not int or not least <= value <= most or value & (value - 1):
            raise ValueError(f"{name} must be a power of two in {least} to {most}: got {value!r}")
    if type(tile.stages) is not int or not 1 <= tile.stages <= 8:
        raise ValueError(f"stages must be in 1 to 8: got {tile.stages!r}")
    if tile.block_c >= products.C and tile.out_c != tile.block_c:
        raise ValueError(
            f"out_c must be block_c where block_c holds a row: got {tile.out_c}, {tile.block_c}"
        )


def can_specialise(products: Products) -> bool:
    """Returns whether there is a warp-specialised sweep, on some GPU."""
    kernel, C, dot, _, plain, online = products
    return kernel == "forward" and C in SPECIALISED and dot == "16bit" and plain and not online


def specialised_tiles(products: Products, capability: int) -> tuple[Tile, ...]:
    """Returns the tiles of warp-specialised sweeps for a compute capability times 10."""
    fits = capability == 90 or (capability // 10 == 10 and products.C in TENSOR_MEMORY)
    return SPECIALISED[products.C] if can_specialise(products) and fits else ()


def dump(path: Path, gpu: str, capability: int, rows: list[dict[str, Any]]) -> None:
    """Writes a table.

    path: file to write. Missing folders are made.
    gpu: name of the GPU.
    capability: compute capability times 10.
    rows: dictionaries with "products" and "tile". Readers ignore further entries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "gpu": gpu, "capability": capability, "tiles": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
