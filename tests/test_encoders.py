from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mocofast import MoCo
from mocofast.models.batch_norm import SplitBatchNorm2d, fuse_batch_norms, split_batch_norm
from mocofast.models.convolutions import CompiledConv2d, compile_convolutions
from mocofast.models.encoders import TinyResNet, add_mlp_head, build_encoder, features, head_name
from mocofast.models.pixels import prepare_images
from tests.eager_moco import LoopedSplitBatchNorm


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arch", "side", "width"),
    [
        ("resnet18", 32, 512),
        ("resnet18_cifar", 16, 512),
        ("resnet_tiny", 8, 64),
        ("vit_b_32", 224, 768),
    ],
)
def test_every_family_gives_embeddings_and_pooled_features(
    arch: str, side: int, width: int
) -> None:
    encoder = build_encoder(arch)(num_classes=11).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert encoder(images).shape == (2, 11)
        pooled = features(encoder, images)
        assert pooled.shape == (2, width)
        head = encoder.get_submodule(head_name(encoder))
        torch.testing.assert_close(head(pooled), encoder(images))


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = build_encoder("resnet18_cifar")(num_classes=3)
    sizes: list[torch.Size] = []
    encoder.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    encoder(torch.randn(2, 3, 32, 32))
    assert sizes == [(2, 64, 32, 32)]


def test_torchvision_encoder_keeps_torchvisions_names() -> None:
    from torchvision.models import resnet50

    assert list(build_encoder("resnet50")(num_classes=128).state_dict()) == list(
        resnet50().state_dict()
    )


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [
        ("resnet51", "resnet50"),
        ("resnet18_cifr", "resnet18_cifar"),
        ("resnettiny", "resnet_tiny"),
        ("vit_b_17", "vit_b_1[46]"),
    ],
)
def test_unknown_name_is_an_error_that_names_a_near_one(arch: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"model.arch: unknown encoder '{arch}'; .* '{nearest}'"):
        build_encoder(arch)


def test_mlp_head_has_the_references_names_and_keeps_the_last_layer() -> None:
    encoder = TinyResNet(num_classes=5)
    last = encoder.fc
    add_mlp_head(encoder)
    assert [name for name, _ in encoder.named_parameters() if name.startswith("fc.")] == [
        "fc.0.weight",
        "fc.0.bias",
        "fc.2.weight",
        "fc.2.bias",
    ]
    assert encoder.fc[0].weight.shape == (64, 64)
    assert encoder.fc[2] is last
    assert features(encoder.eval(), torch.randn(3, 3, 8, 8)).shape == (3, 64)


def test_mlp_head_of_a_vit_goes_into_its_heads() -> None:
    encoder = build_encoder("vit_b_32")(num_classes=5)
    add_mlp_head(encoder)
    assert [
        tuple(p.shape)
        for n, p in encoder.named_parameters()
        if n.startswith("heads.head.") and p.dim() == 2
    ] == [
        (768, 768),
        (5, 768),
    ]


def test_encoder_without_a_head_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ending in fc, head, heads, classifier; Sequential has none"
    ):
        MoCo(lambda num_classes: nn.Sequential(nn.Linear(4, num_classes)))
    encoder = TinyResNet(3)
    encoder.fc = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"expected a linear layer in the encoder's \.fc"):
        add_mlp_head(encoder)


def test_features_leaves_no_hook_behind_even_after_an_error() -> None:
    encoder = TinyResNet(3)
    with pytest.raises(RuntimeError):
        features(encoder, torch.randn(2, 4, 8, 8))
    assert not encoder.fc._forward_pre_hooks


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
# 13 channels and 3 x 5 pixels: odd; one sample per split; one split.
@pytest.mark.parametrize(("size", "splits"), [(12, 4), (6, 6), (5, 1)])
def test_split_batchnorm_is_one_batchnorm_per_split(
    size: int, splits: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    split = SplitBatchNorm2d(13, splits).double()
    nn.init.normal_(split.weight)
    nn.init.normal_(split.bias)
    looped = LoopedSplitBatchNorm(split).double()
    for _ in range(2):  # twice, so that running statistics start from something
        x = torch.randn(size, 13, 3, 5, dtype=torch.float64) * 3 + 2
        ours = x.clone(memory_format=memory_format).requires_grad_()
        theirs = x.clone().requires_grad_()
        grad = torch.randn_like(x)
        y, expected = split(ours), looped(theirs)
        y.backward(grad.contiguous(memory_format=memory_format))
        expected.backward(grad)
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(split.weight.grad, looped.whole.weight.grad)
    torch.testing.assert_close(split.bias.grad, looped.whole.bias.grad)
    torch.testing.assert_close(split.running_mean, looped.whole.running_mean)
    torch.testing.assert_close(split.running_var, looped.whole.running_var)
    assert split.num_batches_tracked == 2
    torch.testing.assert_close(split.eval()(x), looped.eval()(x))


class Norms(nn.Module):
    """BatchNorms of vectors, sequences, maps and volumes, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.rows = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.maps, self.volume = nn.BatchNorm2d(4), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, D, H, W)
        y = self.volume(x)
        y = y + self.maps(y.mean(4))[..., None].sin()
        y = y + self.rows(y.mean((3, 4)))[..., None, None].cos()
        return y + self.flat(y.mean((2, 3, 4)))[..., None, None, None].sin()


@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format])
def test_norms_of_vectors_sequences_and_volumes_are_split_too(
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    ours, x = Norms().double(), torch.randn(6, 4, 2, 3, 5, dtype=torch.float64)
    parts = [copy.deepcopy(ours) for _ in range(3)]  # a model for every split
    split_batch_norm(ours, 3)
    given = x.clone(memory_format=memory_format).requires_grad_()
    y = ours(given)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    for i, part in enumerate(parts):
        own = x[i::3].clone().requires_grad_()
        expected = part(own)
        (expected * weights[i::3]).sum().backward()
        torch.testing.assert_close(y[i::3], expected)
        torch.testing.assert_close(given.grad[i::3], own.grad)  # type: ignore[index]
    for name, value in ours.state_dict().items():
        mean = torch.stack([p.state_dict()[name].double() for p in parts]).mean(0)
        torch.testing.assert_close(value.double(), mean)


def test_split_batchnorm_refuses_a_batch_it_cannot_split_but_only_in_training() -> None:
    split = SplitBatchNorm2d(3, 4)
    x = torch.randn(6, 3, 2, 2)
    before = {name: value.clone() for name, value in split.state_dict().items()}
    with pytest.raises(ValueError, match="got 6 images and 4 splits"):
        split(x)
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())
    assert split.eval()(x).shape == x.shape


def test_conversion_keeps_names_weights_statistics_and_modes() -> None:
    encoder = TinyResNet(3)
    encoder(torch.randn(4, 3, 8, 8))
    encoder.layer1.bn1.eval()
    names, parameters = list(encoder.state_dict()), list(encoder.parameters())
    images = torch.randn(4, 3, 8, 8)
    modes = [m.training for m in encoder.modules()]
    split_batch_norm(encoder, 2)
    assert [m.training for m in encoder.modules()] == modes
    assert list(encoder.state_dict()) == names
    assert all(a is b for a, b in zip(encoder.parameters(), parameters))
    assert not any(type(m) is nn.BatchNorm2d for m in encoder.modules())
    encoder.eval()
    expected = TinyResNet(3).eval()
    expected.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(images), expected(images))


# Basic blocks, and bottlenecks.
@pytest.mark.parametrize(("arch", "side"), [("resnet18_cifar", 16), ("resnet50", 64)])
@pytest.mark.parametrize("training", [True, False])
def test_fused_blocks_compute_what_torchvisions_blocks_compute(
    arch: str, side: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(arch)(num_classes=3)
    plain = copy.deepcopy(encoder)
    split_batch_norm(encoder, 2)
    assert {type(block).__name__ for block in encoder.layer2} <= {
        "FusedBasicBlock",
        "FusedBottleneck",
    }
    with monkeypatch.context() as patch:
        patch.setattr("mocofast.models.batch_norm.fuse_blocks", lambda module: None)
        split_batch_norm(plain, 2)
    assert not any(type(module).__name__.startswith("Fused") for module in plain.modules())
    assert list(encoder.state_dict()) == list(plain.state_dict())
    images = channels_last(torch.randn(8, 3, side, side))
    grads = []
    for model in (encoder, plain):
        model.double().train(training)
        model(images.double()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads)


def leaky(encoder: nn.Module) -> None:
    encoder.layer2[0].relu = nn.LeakyReLU(0.3)  # type: ignore[index, union-attr]


def halved(encoder: nn.Module) -> None:
    """Hooks change what a block, the ReLU and BatchNorms give."""
    for part in ("layer1.1", "layer1.0.bn1", "layer2.0.bn2", "layer2.1.relu", "bn1"):
        encoder.get_submodule(part).register_forward_hook(lambda _, inputs, output: output / 2)


def doubled(encoder: nn.Module) -> None:
    """A block has a function of its own in the place of `forward`."""
    block = encoder.layer3[1]  # type: ignore[index]
    block.forward = lambda x: 2 * type(block).forward(block, x)


def raised(encoder: nn.Module) -> None:
    """A BatchNorm has a function of its own in the place of `forward`."""
    norm = encoder.layer2[1].bn2  # type: ignore[index, union-attr]
    norm.forward = lambda x: 1 + nn.BatchNorm2d.forward(norm, x)


@pytest.mark.parametrize("change", [leaky, halved, doubled, raised])
def test_changed_blocks_keep_their_changes(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18_cifar")(num_classes=3)
    plain = copy.deepcopy(encoder)
    for model in (encoder, plain):
        change(model)
    fuse_batch_norms(encoder)
    assert type(encoder.layer4[0]).__name__ == "FusedBasicBlock"
    images = channels_last(torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(encoder.double()(images.double()), plain.double()(images.double()))


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        {"track_running_stats": False},
        {"running_mean": None, "running_var": None},
        {"num_batches_tracked": None},
        {"momentum": None},
        {"bias": None},
    ],
)
def test_a_changed_batchnorm_computes_what_pytorchs_does(
    values: dict[str, Any], fused_first: bool
) -> None:
    torch.manual_seed(0)
    layers = build_encoder("resnet18_cifar")(num_classes=3).layer1
    plain = copy.deepcopy(layers)
    if fused_first:
        fuse_batch_norms(layers)
    for model in (layers, plain):
        for name, value in values.items():
            setattr(model[0].bn2, name, value)
    fuse_batch_norms(layers)
    for _ in range(2):
        images = channels_last(torch.randn(4, 64, 8, 8))
        torch.testing.assert_close(layers(images), plain(images), rtol=1e-4, atol=1e-4)
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(layers.get_buffer(name), expected, rtol=1e-4, atol=1e-5)


def test_conversion_keeps_the_modules() -> None:
    """An encoder may keep references to its parts."""
    encoder = build_encoder("resnet18_cifar")(num_classes=3)
    parts = list(encoder.modules())
    fuse_batch_norms(encoder)
    assert list(map(id, encoder.modules())) == list(map(id, parts))


@pytest.mark.parametrize("of_gradient", [True, False])
def test_batchnorm_of_negative_views(of_gradient: bool) -> None:
    """The sign of the tensor is a flag beside the memory."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (channels_last(torch.randn(6, 16, 5, 5, generator=generator)) for _ in range(2))
    plain = nn.BatchNorm2d(16)
    layers = nn.Sequential(copy.deepcopy(plain))
    fuse_batch_norms(layers)
    images = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(images), images, grad)
    if of_gradient:
        grad = torch._neg_view(-grad)
    else:
        images = torch._neg_view(-x).requires_grad_()
    (found,) = torch.autograd.grad(layers(images), images, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layers[0].running_mean, plain.running_mean)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (6, 4, 0, 5), (6, 0, 5, 5)])
def test_maps_without_values_are_those_of_pytorch(
    shape: tuple[int, ...], training: bool, splits: int
) -> None:
    plain = nn.BatchNorm2d(shape[1]).train(training)
    layers = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(layers, splits)
    images = channels_last(torch.randn(shape))
    if not shape[1]:
        for model in (plain, layers):
            with pytest.raises(IndexError):
                model(images)
        return
    for model in (plain, layers):
        y = model(images)
        y.sum().backward()
        assert y.shape == shape
    for one, other in zip(layers.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(layers.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_block_takes_float32_under_autocast(training: bool) -> None:
    """The shortcut is float32 then, and the convolutions' results are bfloat16."""
    torch.manual_seed(0)
    layers = build_encoder("resnet18_cifar")(num_classes=3).layer1.train(training)
    plain = copy.deepcopy(layers)
    fuse_batch_norms(layers)
    images = channels_last(torch.randn(4, 64, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layers(images), plain(images)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_torchvision_takes_features_of_a_converted_encoder() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18_cifar")(num_classes=3)
    nodes = ["layer1.0.conv1", "layer3"]
    plain = create_feature_extractor(copy.deepcopy(encoder), nodes)
    split_batch_norm(encoder, 1)
    compile_convolutions(encoder)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = create_feature_extractor(encoder, nodes)
    assert {CompiledConv2d, SplitBatchNorm2d} <= set(map(type, ours.modules()))
    images = channels_last(torch.randn(4, 3, 16, 16))
    for training in (True, False):
        found, expected = ours.train(training)(images), plain.train(training)(images)
        assert list(found) == nodes
        assert torch.allclose(found["layer3"], expected["layer3"], rtol=1e-3, atol=1e-3)
        assert torch.allclose(found[nodes[0]], expected[nodes[0]], rtol=1e-3, atol=1e-4)
    for name, value in plain.named_buffers():
        assert torch.allclose(ours.get_buffer(name).float(), value.float(), rtol=1e-3, atol=1e-4)


def test_conversion_refuses_layers_without_running_statistics() -> None:
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        split_batch_norm(layers, 2)
    assert type(layers[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("autocast", [False, True])
def test_pixels_are_normalised_in_float32_and_channels_last(autocast: bool) -> None:
    pixels = torch.randint(0, 256, (5, 3, 7, 7), dtype=torch.uint8)
    mean, std = torch.tensor([124.0, 116.5, 103.5]), torch.tensor([58.4, 57.1, 57.4])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        images = prepare_images(channels_last(pixels), mean, std)
    expected = (pixels.double() - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    assert images.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    # bfloat16: 8 significant bits, rounded once, at the end: 2^-8 at most. float32: rounded twice.
    torch.testing.assert_close(
        images.double(), expected, rtol=1.001 * 2**-8 if autocast else 2**-22, atol=1e-7
    )


def test_importing_encoders_does_not_import_torchvision() -> None:
    code = "import sys, mocofast.models.encoders; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("splits", [1, 3])
def test_split_batchnorm_without_gradients_equals_split_batchnorm_with_gradients(
    splits: int,
) -> None:
    """The path of the key encoder (split by split, no gradients) equals the query encoder's.

    Another test compares the query encoder's path to BatchNorm.
    """
    torch.manual_seed(0)
    keys = SplitBatchNorm2d(7, splits)
    nn.init.normal_(keys.weight)
    queries = copy.deepcopy(keys)
    x, residual = channels_last(torch.randn(6, 7, 3, 5) + 2), channels_last(torch.randn(6, 7, 3, 5))
    with torch.no_grad():
        y = keys(x, relu=True, residual=residual)
    expected = queries(x, relu=True, residual=residual)
    assert expected.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(keys.state_dict(), queries.state_dict())
