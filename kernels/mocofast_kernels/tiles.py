"""Which tile a product takes: from a table that `mocofast bench autotune` measured on a GPU, else by the rule.

The table is the JSON file that the environment variable MOCOFAST_TILES names, else
`$XDG_CACHE_HOME/mocofast/tiles-<GPU>.json` (`~/.cache` without that variable), if it exists. It is read once.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from mocofast_kernels.configs import Tile, backward_tile, block_of, forward_tile

VARIABLE = "MOCOFAST_TILES"
FORMAT = 1


class Products(NamedTuple):
    """What a tile is chosen for; `configs.forward_tile` says what the flags mean."""

    kernel: str  # "forward", or "negatives" for their gradient
    C: int
    dot: str
    aligned: bool = True
    plain: bool = True
    online: bool = False


TileTable = dict[Products, Tile]


def rule(products: Products) -> Tile:
    """The tile without a table."""
    kernel, C, dot, *flags = products
    return forward_tile(C, dot, *flags) if kernel == "forward" else backward_tile(C, dot)


def tile_of(products: Products, device: torch.device) -> Tile:
    """The tile for a launch on this device. Raises ValueError if there is a table that cannot be used."""
    tile = table(device).get(products)
    return rule(products) if tile is None else tile


def path_of(device: torch.device) -> Path | None:
    """Where the table of a device is looked for; None if nowhere."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    if device.type != "cuda":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return base / "mocofast" / f"tiles-{name}.json"


@functools.cache
def table(device: torch.device) -> TileTable:
    """The table of a device; empty if there is none. A file that was asked for by name must exist."""
    path = path_of(device)
    if path is None or (VARIABLE not in os.environ and not path.exists()):
        return {}
    return load(path, capability_of(device))


def capability_of(device: torch.device) -> int | None:
    """A GPU's compute capability, 8.0 as 80; None for other devices."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def load(path: Path, capability: int | None) -> TileTable:
    """Read a table. ValueError, naming the file and what is wrong, unless every row is sound and it was made for
    this compute capability (times 10; None: for any)."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of tiles can be read: {error}") from None
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
            f"{path}: made for compute capability {content.get('capability')}, this GPU has {capability}"
        )
    result = {}
    for number, row in enumerate(content["tiles"]):
        try:
            products = Products(**row["products"])
            tile = Tile(**row["tile"])
            check(products, tile)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: row {number} of its tiles: {error}; run mocofast bench autotune again"
            ) from None
        result[products] = tile
    return result


def check(products: Products, tile: Tile) -> None:
    """ValueError unless the kernels compute the right thing with this tile."""
    for (name, kind), value in zip(get_type_hints(Products).items(), products):
        if type(value) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}: got {value!r}")
    if products.kernel not in ("forward", "negatives") or products.dot not in (
        "16bit",
        "tf32",
        "ieee",
    ):
        raise ValueError(f"unknown kernel or kind of product: {products}")
    if not 1 <= products.C <= 1024:
        raise ValueError(f"C must be in 1 to 1024: got {products.C}")
    # Sides of a matrix product are powers of two from 16; 32-bit offsets inside a tile allow 256 rows.
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
            f"out_c must be block_c where that holds a whole row: got {tile.out_c}, {tile.block_c}"
        )


def dump(path: Path, gpu: str, capability: int, rows: list[dict[str, Any]]) -> None:
    """Write a table; each row has "products" and "tile", and whatever else is worth keeping."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "gpu": gpu, "capability": capability, "tiles": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
