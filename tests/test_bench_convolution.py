"""`mocofast bench convolution`: the convolutions, their operations, the sums, and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mocofast_bench import commands, convolution
from mocofast_bench.commands import main
from mocofast_kernels import cpu_convolution
from mocofast_kernels.cpu_convolution import Shape
from torch import Tensor, nn

COMPILED = cpu_convolution.convolves(torch.float32)
in_c = pytest.mark.skipif(not COMPILED, reason="neither AVX2 nor AVX-512, or not compiled")


def square(images: int, channels: tuple[int, int], size: int, kernel: int, stride: int) -> Shape:
    """Returns a convolution with zeros around the images. Stride 1 keeps the size."""
    pad = kernel // 2
    return Shape(
        images,
        channels[0],
        size,
        size,
        channels[1],
        (kernel, kernel),
        (stride, stride),
        (pad, pad),
        (1, 1),
    )


def test_products_of_the_zeros_around_images_do_not_count() -> None:
    # Of 9 taps the middle one sees an image of 1 pixel. Rows see 5 taps of 6 at stride 2.
    assert convolution.operations(square(5, (32, 48), 1, 3, 1)) == 2 * 5 * 32 * 48
    assert convolution.operations(square(1, (16, 16), 4, 3, 2)) == 2 * 5 * 5 * 16 * 16
    assert convolution.operations(square(3, (16, 64), 4, 1, 2)) == 2 * 3 * 4 * 16 * 64


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (1, 0), (1, 2)),
        ((5, 3), (3, 2), (4, 1), (2, 1)),
        ((1, 1), (2, 2), (1, 1), (1, 1)),
    ],
)
def test_operations_are_the_taps_that_see_pixels(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    shape = Shape(2, 16, 9, 7, 32, kernel, stride, padding, dilation)
    # With ones everywhere, a pixel of the result is the number of its taps.
    taps = F.conv2d(
        torch.ones(1, 1, 9, 7), torch.ones(1, 1, *kernel), None, stride, padding, dilation
    )
    assert taps.shape[2:] == shape.size
    assert convolution.operations(shape) == 2 * 2 * 16 * 32 * int(taps.sum())


def test_a_resnet_has_its_convolutions_but_the_first() -> None:
    found = convolution.occurrences("resnet18", 32, 6)
    assert sum(found.values()) == 19  # 8 blocks of 2, and 3 shortcuts
    assert found[square(6, (64, 64), 8, 3, 1)] == 4
    assert found[square(6, (512, 512), 1, 3, 1)] == 3
    assert found[square(6, (256, 512), 2, 1, 2)] == 1
    assert len(found) == 10


class Twice(nn.Module):
    """A convolution with two calls, and two convolutions without a form in C."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.shared = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.groups = nn.Conv2d(16, 16, 3, groups=16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.groups(self.shared(self.shared(self.first(x))))
        return result


def test_a_convolution_counts_as_often_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "build_encoder", lambda arch, size: Twice)
    assert convolution.occurrences("", 8, 4) == {square(4, (16, 16), 6, 3, 1): 2}


@in_c
@pytest.mark.parametrize("shape", [square(3, (32, 48), 5, 3, 2), square(2, (16, 32), 4, 1, 1)])
def test_both_sides_compute_the_same(shape: Shape) -> None:
    calls = convolution.sides(shape, torch.float32)
    assert tuple(calls) == convolution.CALLS
    sizes = {
        "result": (shape.images, shape.outputs, *shape.size),
        "image gradient": (shape.images, shape.inputs, shape.height, shape.width),
        "weight gradient": (shape.outputs, shape.inputs, *shape.kernel),
    }
    for call, both in calls.items():
        ours, pytorch = both["mocofast"](), both["pytorch"]()
        assert ours.shape == sizes[call]
        torch.testing.assert_close(ours, pytorch, rtol=1e-4, atol=1e-4)


def made_row(times: int, ours: float, pytorch: float, by_pytorch: bool) -> dict[str, Any]:
    call = {"milliseconds": {"mocofast": ours, "pytorch": pytorch}, "flops": 1000}
    return {
        "times": times,
        "weight_by_pytorch": by_pytorch,
        "calls": dict.fromkeys(convolution.CALLS, call),
    }


def test_the_network_is_the_sum_by_occurrences() -> None:
    rows = [made_row(4, 1.0, 3.0, by_pytorch=False), made_row(1, 20.0, 10.0, by_pytorch=True)]
    found = convolution.network(rows, rate=1e6)
    assert found["times"] == 5
    result, images, weight = (found["calls"][call] for call in convolution.CALLS)
    assert result == images
    assert result["milliseconds"] == {"mocofast": 24.0, "pytorch": 22.0}
    # Training leaves the second gradient to PyTorch.
    assert weight["milliseconds"] == {"mocofast": 14.0, "pytorch": 22.0}
    total = found["total"]
    assert total["milliseconds"] == {"mocofast": 62.0, "pytorch": 66.0}
    assert (total["flops"], total["floor_milliseconds"]) == (15000, 15.0)
    assert total["speedup"] == pytest.approx(66 / 62, abs=1e-3)
    assert total["fraction_of_floor"] == pytest.approx(15 / 62, abs=1e-3)


@in_c
def test_the_command_reports_every_convolution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "matrix_rate", lambda *_: 1e9)
    target = tmp_path / "rows.jsonl"
    sizes = ["--arch", "resnet_tiny", "--size", "4", "--batch", "2", "--dtype", "float32"]
    assert main(["convolution", *sizes, "--repeats", "1", "--save", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = json.loads(target.read_text())
    assert json.loads(lines[-1]) == row
    assert (row["benchmark"], row["arch"], row["size"]) == ("convolution", "resnet_tiny", 4)
    assert (row["batch_size"], row["dtype"], row["matrix_gflops"]) == (2, "float32", 1.0)
    named = [(r["inputs"], r["outputs"], r["height"], r["kernel"], r["times"]) for r in row["rows"]]
    assert named == [
        (16, 16, 4, [3, 3], 2),
        (16, 32, 4, [3, 3], 1),
        (32, 32, 2, [3, 3], 1),
        (16, 32, 4, [1, 1], 1),
        (32, 64, 2, [3, 3], 1),
        (64, 64, 1, [3, 3], 1),
        (32, 64, 2, [1, 1], 1),
    ]
    last = row["rows"][-2]
    assert tuple(last["calls"]) == convolution.CALLS
    for call in last["calls"].values():
        assert call["flops"] == 2 * 2 * 64 * 64
        assert call["floor_milliseconds"] == pytest.approx(0.0164)
        ours, pytorch = call["milliseconds"]["mocofast"], call["milliseconds"]["pytorch"]
        assert call["speedup"] == pytest.approx(pytorch / ours, rel=1e-3, abs=1e-3)
        assert set(call["quartiles"]) == {"mocofast", "pytorch"}
    sums = [
        sum(call["milliseconds"]["mocofast"] for call in r["calls"].values()) for r in row["rows"]
    ]
    assert row["network"]["total"]["milliseconds"]["mocofast"] == pytest.approx(
        sum(sums) + sums[0], abs=1e-3
    )
    table = [line.split() for line in lines]
    assert [words[:5] for words in table if "64-64" in words] == [["64-64", "1x1", "3x3", "1", "1"]]
    assert [words[1] for words in table if words[0] == "network"] == ["8"]


def test_a_machine_without_compiled_convolutions_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "convolves", lambda dtype: False)
    monkeypatch.setattr(cpu_convolution, "kind_of", lambda dtype: (None, "no compiler"))
    message = "PyTorch alone computes convolutions on this machine: no compiler"
    with pytest.raises(SystemExit, match=f"bench convolution: {message}"):
        main(["convolution"])
    # The other benchmarks of `all` run.
    monkeypatch.setattr(commands, "BENCHMARKS", {"convolution": ""})
    assert main(["all", "--device", "cpu"]) == 0
    assert f"convolution is left out: {message}" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_it_is_about_cpus(device: str) -> None:
    with pytest.raises(SystemExit, match="times convolutions on CPUs alone; --device cpu works"):
        main(["convolution", "--device", device])


def test_what_c_does_not_compute_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "convolves", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(cpu_convolution, "kind_of", lambda dtype: (None, "no AVX512-BF16"))
    with pytest.raises(SystemExit, match=r"--dtype bfloat16: PyTorch alone .*: no AVX512-BF16"):
        main(["convolution", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match="--arch vit_tiny: PyTorch alone computes its convolution"):
        main(["convolution", "--arch", "vit_tiny"])
