from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast import MoCo
from mocofast.interop import backbone_state_dict, load_reference_state_dict, to_reference_state_dict
from mocofast.models.encoders import TinyResNet, build_encoder
from tests.eager_moco import EagerMoCo, random_batches


def small_moco(seed: int, **options: object) -> MoCo:
    torch.manual_seed(seed)
    return MoCo(TinyResNet, **{"dim": 6, "queue_size": 11, "mlp": True, **options})


def reference_state(seed: int, prefix: str = "") -> dict[str, Tensor]:
    """A state dict as facebookresearch/moco saves it, written by hand from its description."""
    torch.manual_seed(seed)
    state = {}
    for name in ("encoder_q", "encoder_k"):
        encoder = TinyResNet(6)
        head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), encoder.fc)
        encoder.fc = head  # type: ignore[assignment]
        encoder(torch.randn(5, 3, 8, 8))  # changes the running statistics
        state |= {f"{prefix}{name}.{key}": value for key, value in encoder.state_dict().items()}
    state[f"{prefix}queue"] = F.normalize(torch.randn(6, 11), dim=0)
    state[f"{prefix}queue_ptr"] = torch.tensor([7])
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading_then_saving_returns_equal_tensors(prefix: str) -> None:
    state = reference_state(1, prefix)
    model = small_moco(2)
    load_reference_state_dict(model, state)
    saved = to_reference_state_dict(model)
    assert [f"{prefix}{name}" for name in saved] == list(state) or {
        prefix + n for n in saved
    } == state.keys()
    for name, value in saved.items():
        assert value.dtype == state[prefix + name].dtype
        assert value.is_contiguous()
        assert torch.equal(value, state[prefix + name]), name


def test_a_loaded_model_continues_as_the_reference_would() -> None:
    state = reference_state(1)
    model = small_moco(2)
    load_reference_state_dict(model, state)
    assert torch.equal(model.queue, state["queue"].t())
    assert model.queue.is_contiguous()
    eager = EagerMoCo(model, torch.float32)
    eager.queue.copy_(state["queue"])
    eager.pointer = 7
    im_q, im_k = random_batches(1, 6)[0]  # 6 keys from row 7 on: past the end of 11
    torch.testing.assert_close(model(im_q, im_k).loss, eager(im_q, im_k), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        to_reference_state_dict(model)["queue"], eager.queue, rtol=1e-5, atol=1e-6
    )


def test_a_whole_checkpoint_file_loads(tmp_path: Path) -> None:
    state = reference_state(1, "module.")
    torch.save(
        {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}},
        tmp_path / "moco.pth.tar",
    )
    model = small_moco(2)
    load_reference_state_dict(model, torch.load(tmp_path / "moco.pth.tar", weights_only=True))
    assert torch.equal(model.encoder_k.fc[2].weight, state["module.encoder_k.fc.2.weight"])


def test_whatever_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    state = reference_state(1)
    del state["encoder_q.bn1.bias"]
    state["encoder_q.layer9.weight"] = torch.zeros(2)
    state["queue"] = torch.zeros(6, 12)
    state["queue_ptr"] = 7  # type: ignore[assignment]
    model = small_moco(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict: not that of this model: ") as error:
        load_reference_state_dict(model, state)
    for part in (
        "missing encoder_q.bn1.bias",
        "unknown encoder_q.layer9.weight",
        "queue is (6, 12) instead of (6, 11)",
        "queue_ptr is a int instead of a tensor",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"missing (encoder_k[\w.]+, ){4}encoder_k[\w.]+ and \d+ m"
    ):
        load_reference_state_dict(model, {})


def test_a_v1_checkpoint_does_not_load_into_v2() -> None:
    with pytest.raises(ValueError, match=r"missing encoder_k.fc.0.bias.*unknown encoder_k.fc.bias"):
        load_reference_state_dict(small_moco(2), to_reference_state_dict(small_moco(1, mlp=False)))


def test_a_bfloat16_queue_is_saved_as_the_references_float32() -> None:
    model = small_moco(2, queue_dtype="bfloat16")
    load_reference_state_dict(model, reference_state(1))
    queue = to_reference_state_dict(model)["queue"]
    assert queue.dtype == torch.float32
    assert torch.equal(queue.t().bfloat16(), model.queue)


def test_saving_does_not_need_the_channels_last_model_to_be_contiguous() -> None:
    model = small_moco(2).to(memory_format=torch.channels_last)
    load_reference_state_dict(model, reference_state(1))
    assert model.encoder_q.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(
        torch.equal(v, reference_state(1)[k]) for k, v in to_reference_state_dict(model).items()
    )


@pytest.mark.parametrize(("arch", "head"), [("resnet18", "fc"), ("vit_b_32", "heads")])
def test_backbone_loads_into_torchvisions_model_apart_from_the_head(arch: str, head: str) -> None:
    from torchvision.models import get_model

    model = MoCo(build_encoder(arch), dim=6, queue_size=3, mlp=True)
    target = get_model(arch)
    missing, unexpected = target.load_state_dict(backbone_state_dict(model), strict=False)
    assert unexpected == []
    assert missing
    assert all(name.startswith(f"{head}.") for name in missing)
    first = next(iter(target.state_dict()))
    assert torch.equal(target.state_dict()[first], model.encoder_q.state_dict()[first])
    whole = backbone_state_dict(model, head=True)
    assert whole.keys() == model.encoder_q.state_dict().keys()


def test_compiled_and_wrapped_models_exchange_weights_as_plain_models(tmp_path: Path) -> None:
    plain = small_moco(3)
    expected, backbone = to_reference_state_dict(plain), backbone_state_dict(plain)
    compiled = torch.compile(small_moco(3), backend="eager")
    inside = small_moco(3)
    inside.encoder_q = torch.compile(inside.encoder_q, backend="eager")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped, other = (nn.parallel.DistributedDataParallel(small_moco(3)) for _ in range(2))
        both = torch.compile(other, backend="eager")
        for model in (compiled, inside, wrapped, both):
            found = to_reference_state_dict(model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            own = backbone_state_dict(model)
            assert own.keys() == backbone.keys()
            assert all(torch.equal(own[name], backbone[name]) for name in backbone)
            new = to_reference_state_dict(small_moco(4))
            load_reference_state_dict(model, new)
            loaded = to_reference_state_dict(model)
            assert all(torch.equal(loaded[name], new[name]) for name in new)
    finally:
        torch.distributed.destroy_process_group()
