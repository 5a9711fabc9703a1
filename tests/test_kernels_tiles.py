"""Checks tables of tiles: where a table is found, what is refused, and the use in kernels."""

from __future__ import annotations

import json
import runpy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import runs
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_bench import autotune
from mocofast_bench.autotune import candidates
from mocofast_bench.commands import main
from mocofast_kernels import configs, infonce, tiles
from mocofast_kernels.configs import SPECIALISED, Architecture, Tile
from mocofast_kernels.infonce import infonce_forward
from mocofast_kernels.tiles import Products

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)

PRODUCTS = Products("forward", 24, "ieee", plain=False)  # float32 negatives, normalised inside
TILE = Tile(16, 64, 16, 32, 4, 1)  # rule: 32 rows of queries, 32 rows of negatives, 32 columns
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tiles.VARIABLE, raising=False)
    tiles.table.cache_clear()
    yield
    tiles.table.cache_clear()
    torch.set_float32_matmul_precision("highest")  # tuning for tf32 sets it


def _write(path: Path, **changes: Any) -> Path:
    """Writes a table of a single row, sound except for `changes`, and returns the path."""
    products, tile = PRODUCTS._asdict(), TILE._asdict()
    row = {"products": {k: changes.get(k, v) for k, v in products.items()}}
    row["tile"] = {k: changes.get(k, v) for k, v in tile.items()}
    tiles.dump(path, "some GPU", 90, [row])
    return path


def test_the_rule_holds_without_a_table_and_for_what_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiles.tile_of(PRODUCTS, CPU) == tiles.rule(PRODUCTS) != TILE
    monkeypatch.setenv(tiles.VARIABLE, str(_write(tmp_path / "tiles.json")))
    tiles.table.cache_clear()
    assert tiles.tile_of(PRODUCTS, CPU) == TILE
    other = PRODUCTS._replace(online=True)
    assert tiles.tile_of(other, CPU) == tiles.rule(other)


def test_a_gpu_s_own_table_lies_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = torch.device("cuda", 0)
    with (
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA H200 (80GB)"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        path = tiles.path_of(gpu)
        assert path == tmp_path / "mocofast" / "tiles-nvidia-h200-80gb.json"
        assert tiles.table(gpu) == {}
        tiles.table.cache_clear()
        _write(path)
        assert tiles.table(gpu) == {PRODUCTS: TILE}
    assert tiles.path_of(CPU) is None


def test_a_table_changes_the_launch_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # More queries than one block of either tile, and a ragged last tile of negatives.
    query, positive, negatives = (
        torch.randn(n, 24, generator=generator).to(DEVICE) for n in (37, 37, 150)
    )

    def run() -> tuple[infonce.InfoNCEForward, tuple[int, ...]]:
        with mock.patch.object(infonce, "split_count", side_effect=infonce.split_count) as counted:
            result = infonce_forward(
                query,
                positive,
                negatives,
                0.1,
                normalize=True,
                normalize_negatives=True,
                exclude_period=0,
                return_rank=True,
                compute_grad=True,
                dot_dtype=torch.float32,
            )
        return result, counted.call_args.args[:2]

    by_rule, (blocks, steps) = run()
    assert (blocks, steps) == (2, 5)
    monkeypatch.setenv(tiles.VARIABLE, str(_write(tmp_path / "tiles.json")))
    tiles.table.cache_clear()
    by_table, (blocks, steps) = run()
    assert (blocks, steps) == (3, 3)
    # Sums of 150 float32 terms in another order.
    torch.testing.assert_close(by_table.loss, by_rule.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_table.grad_query, by_rule.grad_query, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stay": 48}, "stay must be a power of two"),
        # 32-bit offsets reach 256 rows.
        ({"stream": 512}, "stream must be a power of two in 16 to 256"),
        ({"block_c": 64}, "block_c must be a power of two in 16 to 32"),
        ({"block_c": 32, "out_c": 16}, "out_c must be block_c"),
        ({"warps": 4.0}, "warps must be"),
        ({"stages": 0}, "stages must be in 1 to 8"),
        ({"kernel": "backward"}, "unknown kernel"),
        ({"dot": "fp8"}, "unknown kernel"),
        ({"C": True}, "C must be of type int"),
        ({"C": 8193}, "C must be in 1 to 8192"),
        ({"plain": 1}, "plain must be of type bool"),
    ],
)
def test_a_row_that_the_kernels_cannot_use_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "tiles.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        tiles.load(path, None)
    assert str(path) in str(error.value)
    assert "row 0" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "tiles": []}', '{"format": 1}', '{"format": 1, "tiles": [7]}']
)
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json: "):
        tiles.load(path, None)


def test_a_table_of_another_architecture_or_a_named_one_that_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "tiles.json")
    assert tiles.load(path, 90) == {PRODUCTS: TILE}
    with pytest.raises(ValueError, match="made for compute capability 90, this GPU has 80"):
        tiles.load(path, 80)
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"missing\.json"):
        tiles.tile_of(PRODUCTS, CPU)


def test_small_shared_memory_takes_smaller_tiles_for_the_queue() -> None:
    queue = Products("forward", 128, "16bit")
    assert tiles.rule(queue).stream == 128
    # 40 KB of tiles: two programs fit into the 100 KB of an RTX 3090, 4090 or 5090.
    assert tiles.rule(queue, Architecture(100 * 1024)).stream == 64
    assert tiles.rule(queue, Architecture(hopper=True)).stages == 3
    # The registers of AMD's GPUs hold 32 negatives beside 128 queries.
    assert tiles.rule(queue._replace(plain=False), Architecture(amd=True)).stream == 32
    for C in (64, 128, 256):  # no rule takes a sweep that no GPU has run
        for gpu in (Architecture(), Architecture(228 * 1024, hopper=True)):
            assert not tiles.rule(queue._replace(C=C), gpu).specialised


def test_launches_on_amds_gpus_ask_for_nothing_that_their_compiler_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MI250X has the compute capability 9.0 of a Hopper."""
    found = types.SimpleNamespace(major=9, minor=0, shared_memory_per_multiprocessor=2**16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    of_nvidia = configs.architecture.__wrapped__(torch.device("cuda"))
    assert of_nvidia == Architecture(2**16, hopper=True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configs.architecture.__wrapped__(torch.device("cuda")) == Architecture(2**16, amd=True)
    assert "maxnreg" in configs.ALL_REGISTERS
    assert runpy.run_path(configs.__file__)["ALL_REGISTERS"] == configs.FUSED


@pytest.mark.parametrize("C", [1, 24, 101, 128, 256, 512, 1024, 8192])
@pytest.mark.parametrize("dot", ["16bit", "tf32", "ieee"])
def test_every_candidate_is_one_that_a_table_may_hold(C: int, dot: str) -> None:
    for kernel in ("forward", "negatives"):
        products = Products(kernel, C, dot)
        found = list(candidates(products, 227 * 1024))
        assert 0 < len(found) == len(set(found)) <= 64
        for tile in found:
            tiles.check(products, tile)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_autotune_without_a_gpu_says_so_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit) as exit_info:
        main(["autotune"])
    assert exit_info.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def _autotune(out: Path, *options: str) -> list[dict[str, Any]]:
    """Runs autotune in a new process, since the test's process may interpret the kernels."""
    problem = ("--types", "fp32", "--kinds", "in-batch", "--c", "16")
    result = runs.compiled("mocofast", "bench", "autotune", *problem, "--out", str(out), *options)
    assert result.returncode == 0, result.stderr
    assert "(the rule)" in result.stdout
    rows: list[dict[str, Any]] = json.loads(out.read_text())["tiles"]
    return rows


def test_the_fastest_candidates_of_every_problem_go_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Takes made-up times, which prefer many columns of negatives, then few stages."""

    def times(capability: int, problem: Any, tried: list[Tile]) -> dict[Tile, float]:
        assert capability == 100
        return {
            tile: 1e-6 * (tile.stages + 1000 / tile.stream + tile.warps / 100) for tile in tried
        }

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(autotune, "_predict_times", times)
    out = tmp_path / "tiles.json"
    kinds = [
        "--kinds",
        "queue",
        "gradient of negatives",
        "--types",
        "bf16",
        "fp32 as tf32",
        "--c",
        "64",
    ]
    assert main(["autotune", "--static", "--capability", "100", *kinds, "--out", str(out)]) == 0
    found = tiles.load(out, 100)
    assert len(found) == 2 * 2
    assert Products("forward", 64, "tf32") in found
    assert Products("negatives", 64, "16bit") in found
    assert {(tile.stream, tile.stages) for tile in found.values()} == {(128, 2)}
    assert "(the rule)" in capsys.readouterr().out


@pytest.mark.parametrize("specialised", [True, False])
def test_the_specialised_sweep_is_tried_where_it_is_asked_for(
    specialised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def times(capability: int, problem: Any, tried: list[Tile]) -> dict[Tile, float]:
        return {tile: 1e-6 * (2 - tile.specialised) for tile in tried}

    monkeypatch.setattr(autotune, "_predict_times", times)
    out = tmp_path / "tiles.json"
    command = ["autotune", "--static", "--capability", "90", "--types", "bf16", "--c", "64", "101"]
    command += ["--kinds", "queue", "in-batch", "--out", str(out), *["--specialised"] * specialised]
    assert main(command) == 0
    found = tiles.load(out, 90)
    assert [tile.specialised for tile in found.values()] == [specialised, False, False, False]
    # Tables of other kinds of call refuse the tile, and so do tables of other sizes.
    row = {"products": PRODUCTS._asdict(), "tile": SPECIALISED[64][0]._asdict()}
    tiles.dump(out, "some GPU", 90, [row])
    with pytest.raises(ValueError, match="no warp-specialised sweep is"):
        tiles.load(out, 90)


def test_values_are_compared_before_a_specialised_sweep_is_timed() -> None:
    rows = torch.arange(12.0).view(3, 4)
    result = infonce.InfoNCEForward(rows[0], rows[1], rows[2].int(), rows, rows, rows[0])
    assert autotune.agree(result, result._replace(loss=rows[0] + 1e-3))
    assert not autotune.agree(result, result._replace(grad_query=rows + 1))
    assert not autotune.agree(result, result._replace(loss=rows[0] * torch.nan))


@pytest.mark.slow
def test_static_autotune_writes_a_table_that_loads(tmp_path: Path) -> None:
    # float32 products of 16 columns have the fewest candidates.
    (row,) = _autotune(tmp_path / "tiles.json", "--static", "--capability", "80")
    assert 0 < row["microseconds"] <= row["rule_microseconds"]
    (products,) = tiles.load(tmp_path / "tiles.json", 80)
    assert products == Products("forward", 16, "ieee", True, False, True)


@pytest.mark.gpu
def test_autotune_on_a_gpu_writes_a_table_that_loads_there(tmp_path: Path) -> None:
    (row,) = _autotune(tmp_path / "tiles.json", "--n", "64", "--k", "1024", "--repeats", "3")
    assert 0 < row["microseconds"] <= row["rule_microseconds"]
    major, minor = torch.cuda.get_device_capability()
    assert len(tiles.load(tmp_path / "tiles.json", 10 * major + minor)) == 1
