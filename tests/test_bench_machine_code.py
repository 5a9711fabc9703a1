"""`mocofast bench static`: numbers read from machine code, predictions, and the committed table."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from mocofast_bench.machine_code import HEADLINES
from mocofast_bench.roofline import CARDS, GPUS, resident_programs

from tests import runs

pytest.importorskip("triton")

from mocofast_bench.inspect_code import PROCESSORS, Report
from mocofast_bench.listing import covered_exponentials, main_loop, parse_listing, shared_bytes

COMMITTED = runs.ROOT / "benchmarks" / "results" / "machine_code.jsonl"
MOCO = "forward, C=128, bf16, queue"
EMA = "ema, torch.float32, ResNet-50, float momentum"
ENQUEUE = "enqueue, C=128, fp32"
LARS = "lars_, torch.float32, ResNet-50, float lr, with EMA"


def _table(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str, str], dict[str, Any]]]:
    """Returns the first line, and {(case, kernel, architecture): {field: value}} of the rest."""
    head, *lines = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in lines:
        for name in (name for name in entry if name.startswith("sm_")):
            rows.setdefault(
                (entry["case"], entry["kernel"], name),
                dict(zip(head["fields"], entry[name], strict=True)),
            )
    return head, rows


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict[tuple[str, str, str], dict[str, Any]], str]:
    """Returns printed text, written rows and summary, for a case of every kind."""
    folder = tmp_path_factory.mktemp("machine_code")
    only = "|".join(f"^{case}$" for case in (MOCO, EMA, ENQUEUE, LARS))
    written = ("--json", str(folder / "rows"), "--summary", str(folder / "summary"))
    result = runs.compiled("mocofast", "bench", "--static", "--only", only, *written)
    assert result.returncode == 0, result.stderr
    return result.stdout, _table(folder / "rows")[1], (folder / "summary").read_text("utf-8")


def test_bytes_and_operations_are_those_of_the_mathematics(table: Any) -> None:
    _, rows, _ = table
    # torchvision's ResNet-50 without fc, 23,508,032, and the two layers of the head.
    weights = 27_966_656
    assert rows[EMA, "_ema_kernel", "sm_90"]["bytes"] == 3 * 4 * weights
    vectors = 53_120 + 2048 + 128  # weights and biases of BatchNorm, and biases of the head
    assert rows[LARS, "_squares_kernel", "sm_90"]["bytes"] == 2 * 4 * (weights - vectors)
    # Keys in float32 and the pointer are read, rows of the queue are written.
    assert rows[ENQUEUE, "_enqueue_kernel", "sm_90"]["bytes"] == 2 * 4 * 256 * 128 + 8
    for capability in PROCESSORS:
        sweep = rows[MOCO, "_sweep_kernel", f"sm_{capability}"]
        assert sweep["operations"] == 4 * 256 * 65536 * 128
        splits = sweep["programs"] // (256 // 64)
        # Queries, positives and queue in bfloat16. For every slice of the negatives and every row:
        # sums (C), total and positive rank.
        assert sweep["bytes"] == 2 * 128 * (256 + 256 + 65536) + splits * 256 * (4 * 128 + 4 + 4)


def test_the_time_of_the_headline_is_its_waves_of_rounds(table: Any) -> None:
    _, rows, summary = table
    sweep = rows[MOCO, "_sweep_kernel", "sm_90"]
    # 512 tiles in 64 slices: 8 rounds and 2 more rounds, of two programs with 4 x 64 x 128 x 128
    # operations at 4096 a clock, and 64 exponentials for each of 128 threads at 16 a clock. Half of
    # what could overlap does. Three stages hide the latency of copies.
    assert sweep["programs"] == 4 * 64
    assert sweep["resident"] == 2
    assert sweep["limit"] == "matrix"
    matrix, exponentials = 4 * 64 * 128 * 128 / 4096, 64 * 128 / 16
    assert sweep["loop"] < exponentials
    expected = 10 * 2 * (matrix + exponentials / 2) / GPUS[90].clock
    assert sweep["microseconds"] == pytest.approx(1e6 * expected, abs=0.01)
    assert "| info_nce, bf16 | H200 | sweep_kernel |" in summary


def test_the_main_loop_is_the_loop_over_whole_tiles(table: Any) -> None:
    """The loop over the last negatives has a quarter of the exponentials, and more products."""
    printed, rows, _ = table
    assert f"({MOCO})" in printed
    for name, fewest, most in (("sm_90", 400, 600), ("sm_80", 700, 1100)):
        # 64 x 128 logits are 64 a thread, with 5 to 10 instructions for each logit. sm_80 needs
        # more instructions for loads and products.
        assert fewest < rows[MOCO, "_sweep_kernel", name]["loop"] < most


def test_the_committed_table_is_that_of_the_code(table: Any) -> None:
    head, committed = _table(COMMITTED)
    if head["triton"] != importlib.metadata.version("triton"):
        pytest.skip(f"the table is Triton {head['triton']}'s")
    for key, row in table[1].items():
        if key in committed:  # equal code is listed once, at the first case that has the code
            message = f"{key}: write the table again as benchmarks/results/machine_code.md says"
            assert committed[key] == row, message
    assert {
        (MOCO, "_sweep_kernel", f"sm_{capability}") for capability in PROCESSORS
    } <= committed.keys()
    assert max(row["spills"] for row in committed.values()) == 0
    summary = COMMITTED.with_suffix(".md").read_text("utf-8")
    assert all(
        f"| {call} | {gpu.name} |" in summary
        for call in HEADLINES
        for gpu in CARDS
        if ("specialised" not in call or gpu.name == ("B200" if "Blackwell" in call else "H100"))
    )


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (("--only", "no such case"), {}, "no case has a match"),
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
    ],
)
def test_what_cannot_be_compiled_exits_with_2(
    options: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    result = runs.compiled("mocofast", "bench", "--static", *options, **variables)
    assert result.returncode == 2
    assert message in result.stderr


def _report(**numbers: int) -> Report:
    return Report("", "", 90, **{name: numbers.get(name, 0) for name in Report._fields[3:]})


def test_occupancy_is_what_registers_shared_memory_threads_and_tensor_memory_allow() -> None:
    def resident(capability: int, **numbers: int) -> int:
        return resident_programs(_report(**numbers), GPUS[capability])

    assert resident(90, registers=255, warps=4) == 2  # 65536 / (256 x 128)
    assert resident(90, registers=255, warps=8) == 1
    assert resident(90, registers=16, warps=4) == 16  # 2048 threads
    assert resident(90, registers=16, warps=1) == 32
    assert resident(90, registers=33, warps=4) == 12  # the GPU allocates 40 for 33
    # 164 KB of shared memory, and the system takes 1 KB for every program.
    assert resident(80, registers=128, warps=4, shared=80 * 1024) == 2
    assert resident(80, registers=128, warps=4, shared=82 * 1024) == 1
    assert resident(100, registers=128, warps=4, tensor_memory=256) == 2


def test_the_main_loop_counts_inner_loops_for_every_chunk_and_follows_jumps_in_all_forms() -> None:
    lines = [
        "MOV R1, R2",
        "@!P0 BRA 0x00c0",
        "FADD R1, R1, R2",
        "FFMA R1, R1, R2, R3",
        "@P1 BRA 0x0030",
        "MUFU.EX2 R1, R1",
        "@P0 CALL.REL.NOINC 0x0080",
        "BRA 0x0020",
        "MUFU.EX2 R1, R1",
        "MUFU.EX2 R1, R1",
        "NOP",
        "BRA.U !UP2, 0x0080",
        "EXIT",
        "BRA 0x00d0",
    ]
    code = parse_listing(
        "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    )
    # Two loops: 0x20 to 0x70 with an inner loop 0x30 to 0x40, and 0x80 to 0xb0. The second loop
    # has more exponentials.
    assert main_loop(code, 5) == {"MUFU": 2, "BRA": 1}
    shorter = [x for x in code if x.address != 0x90]
    assert main_loop(shorter, 5) == {"MUFU": 1, "BRA": 1}
    outer = [x for x in code if x.address not in (0x80, 0x90)]
    assert main_loop(outer, 5) == {"FADD": 1, "FFMA": 5, "BRA": 6, "MUFU": 1, "CALL": 1}


def test_exponentials_are_covered_from_a_product_to_the_wait_for_it() -> None:
    lines = [
        "MUFU.EX2 R1, R1",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]",
        "MUFU.EX2 R1, R1",
        "MUFU.EX2 R1, R1",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "MUFU.EX2 R1, R1",
        "@P0 BRA 0x0000",
    ]

    def covered(order: list[str]) -> int:
        listing = (f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(order))
        return covered_exponentials(parse_listing("\n".join(listing)))

    assert covered(lines) == 2
    # The product runs on into the next round, whose first exponential it covers.
    assert covered([lines[0], lines[4], *lines[2:4], lines[5], lines[1], lines[6]]) == 1
    assert covered([lines[0], *lines[2:4], lines[6]]) == covered(["EXIT"]) == 0


def test_shared_memory_is_counted_by_width_and_by_operands() -> None:
    lines = [
        "LDS.128 R4, [R1]",
        "@P0 STS.U16 [R1], R2",
        "LDS R4, [R1]",
        "LDSM.16.MT88.4 R4, [R1]",
        "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]",
        "HGMMA.64x32x16.F32.BF16 R24, R88, gdesc[UR4]",
        "@P0 BRA 0x0000",
        "LDS.128 R4, [R1]",
    ]
    listing = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    # 16, 2 and 4 bytes of 32 threads, four matrices of 128 bytes, 16 bytes of 32 threads. A quarter
    # of a warpgroup's operands: 32 bytes of 128 + 64 rows, and of 32 rows.
    expected = 32 * (16 + 2 + 4) + 512 + 512 + 8 * (128 + 64) + 8 * 32
    assert shared_bytes(parse_listing(listing)) == expected
