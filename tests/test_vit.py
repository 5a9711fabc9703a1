"""The ViTs of MoCo v3 equal timm's, and the position embedding equals a plain loop."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mocofast.config import ConfigError
from mocofast.models.encoders import build_encoder
from mocofast.models.vit import SIZES, SelfAttention, sincos_position_embedding
from tests.timm_names import timms


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build_encoder("vit_tiny_cifar", 32)(num_classes=5)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    rows, columns, dim = 3, 5, 8
    expected = torch.zeros(1 + rows * columns, dim, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            frequencies = [10000 ** (-i / 2) for i in range(2)]
            expected[1 + row * columns + column] = torch.tensor(
                [
                    wave(place * f)
                    for place in (row, column)
                    for wave in (math.sin, math.cos)
                    for f in frequencies
                ]
            )
    torch.testing.assert_close(
        sincos_position_embedding(rows, columns, dim)[0].double(), expected, rtol=1e-6, atol=1e-6
    )


def test_it_computes_what_timms_vision_transformer_computes() -> None:
    ours = tiny().eval()
    patch, layers, heads, width = SIZES["vit_tiny_cifar"]
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads, num_classes=5
    ).eval()
    theirs.load_state_dict({timms(name): value for name, value in ours.state_dict().items()})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_positions_and_patches_are_frozen_and_nothing_else() -> None:
    frozen = {name for name, p in tiny().named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}


def test_layers_start_uniform_and_query_key_and_value_as_three() -> None:
    model = tiny()
    width = 192

    def assert_uniform(weight: Tensor, bound: float) -> None:
        # Of at least 36,864 values: the largest is within 0.1 % of the bound, the deviation 1 %.
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=1e-2)

    for layer in model.encoder.layers:
        assert_uniform(layer.self_attention.in_proj_weight, math.sqrt(6 / (2 * width)))
        assert_uniform(layer.mlp[0].weight, math.sqrt(6 / (5 * width)))
    patch = model.conv_proj.weight
    assert patch.abs().max() <= math.sqrt(6 / (3 * 16 + width))
    assert patch.std().item() == pytest.approx(math.sqrt(2 / (3 * 16 + width)), rel=0.05)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(not bias.any() for bias in biases)
    assert 0 < model.class_token.abs().max() < 1e-5


def test_vit_base_has_the_names_and_shapes_of_torchvisions_and_vit_small_twelve_heads() -> None:
    with torch.device("meta"):  # without memory for 86 million parameters
        ours, theirs = (
            build_encoder("vit_base")(num_classes=7),
            torchvision.models.vit_b_16(num_classes=7),
        )
        small = build_encoder("vit_small")(num_classes=7)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert {
        layer.self_attention.num_heads for layer in (*ours.encoder.layers, *small.encoder.layers)
    } == {12}
    assert (len(small.encoder.layers), small.class_token.shape[2]) == (12, 384)


def test_images_are_made_of_whole_patches() -> None:
    for arch, patch in (("vit_small", 16), ("vit_b_32", 32)):
        with pytest.raises(ConfigError, match=rf"augment\.size: expected a multiple of {patch}"):
            build_encoder(arch, 72)


def test_torchvisions_vits_take_the_images_size_and_embed_images_apart() -> None:
    encoder = build_encoder("vit_b_32", 32)(num_classes=3).eval()
    a, b = encoder(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(a, b, atol=1e-4)  # torchvision's head of zeros would give zeros


def with_torchvisions_attention(ours: nn.Module, dropout: float = 0.0) -> nn.Module:
    """Returns a copy with torch.nn.MultiheadAttention, as torchvision makes it."""
    model = copy.deepcopy(ours)
    for block in model.encoder.layers:
        own = block.self_attention
        width, heads = own.out_proj.in_features, own.num_heads
        block.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
    model.to(ours.class_token.dtype).load_state_dict(ours.state_dict())
    return model


def loss_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(images).square().mean()
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ["vit_tiny_cifar", "vit_b_32"])
def test_packed_attention_computes_what_torchvisions_attention_computes(
    arch: str, training: bool
) -> None:
    torch.manual_seed(0)
    ours = build_encoder(arch, 32)(num_classes=5)
    del ours.encoder.layers[2:]
    ours = ours.double().train(training)
    theirs = with_torchvisions_attention(ours).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    expected = loss_and_gradients(theirs, images)
    for got, want in zip(loss_and_gradients(ours, images), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    # In float32 every sum is rounded in another order.
    for got, want in zip(loss_and_gradients(ours.float(), images.float()), expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
    with torch.no_grad():  # torch.nn.MultiheadAttention then takes another path
        torch.testing.assert_close(ours.double()(images), theirs(images), rtol=1e-10, atol=1e-12)


def test_packed_attention_drops_weights_in_training_alone() -> None:
    theirs = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True).double()
    ours = SelfAttention(theirs)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    found = {}
    for training in (True, False):
        for name, attention in (("ours", ours), ("theirs", theirs)):
            torch.manual_seed(4)  # seeds the dropout
            attention.train(training)
            found[name, training] = attention(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(found["ours", training], found["theirs", training])
    assert not torch.allclose(found["ours", True], found["ours", False])


def test_a_vit_is_compiled_in_one_graph() -> None:
    model = tiny()
    del model.encoder.layers[1:]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        loss_and_gradients(compiled, images), loss_and_gradients(model, images)
    )
