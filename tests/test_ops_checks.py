"""Bad input: the error names argument, value and expectation, and nothing is modified."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mocofast_kernels.remembered import LISTS
from torch import Tensor

from mocofast import ops
from mocofast.ops import memory

GOOD = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
EMPTY = GOOD[:, None][:, :0]
IDS = torch.arange(3)


@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, r"query .*\[1\]", ([1], GOOD), {}),
        (TypeError, r"query .*int64 tensor of shape \(3, 4\)", (GOOD.long(), GOOD), {}),
        (TypeError, r"positive_key .*float64", (GOOD, GOOD.double()), {}),
        (TypeError, r"negative_keys .*bool", (GOOD, GOOD, GOOD > 0), {}),
        (ValueError, r"query .*\(N, C\).*\(4,\)", (GOOD[0], GOOD[0]), {}),
        (ValueError, r"query .*not empty.*\(0, 4\)", (GOOD[:0], GOOD[:0]), {}),
        (ValueError, r"query .*not empty.*\(3, 0\)", (GOOD[:, :0], GOOD[:, :0]), {}),
        (ValueError, r"positive_key .*\(2, 4\).*\(3, 4\)", (GOOD, GOOD[:2]), {}),
        (ValueError, r"positive_key .*\(3, 1\).*\(3, 4\)", (GOOD, GOOD[:, :1]), {}),
        (ValueError, r"positive_key .*device.*meta", (GOOD, GOOD.to("meta")), {}),
        (ValueError, r"negative_keys .*\(K, C\).*\(0, 4\)", (GOOD, GOOD, GOOD[:0]), {}),
        (
            ValueError,
            r"negative_keys .*rows of query.*got 1, expected 3",
            (GOOD, GOOD, GOOD[None]),
            {},
        ),
        (ValueError, r"negative_keys .*\(N, M, C\).*\(3, 0, 4\)", (GOOD, GOOD, EMPTY), {}),
        (
            ValueError,
            r"negative_keys .*\(K, C\).*\(1, 1, 3, 4\)",
            (GOOD,) * 2 + (GOOD[None, None],),
            {},
        ),
        (TypeError, r"query .*meta", (GOOD.double().to("meta"),) * 2, {}),
        (TypeError, r"query_ids .*integers.*\(3,\).*None", (GOOD,) * 3, {"key_ids": IDS}),
        (TypeError, r"key_ids .*\(3,\).*None", (GOOD,) * 3, {"query_ids": IDS}),
        (TypeError, r"query_ids .*float32", (GOOD, GOOD), {"query_ids": GOOD[:, 0]}),
        (
            ValueError,
            r"key_ids .*\(3,\).*\(2,\)",
            (GOOD,) * 3,
            {"query_ids": IDS, "key_ids": IDS[:2]},
        ),
        (ValueError, r"query_ids .*meta", (GOOD, GOOD), {"query_ids": IDS.to("meta")}),
        (TypeError, r"exclude .*bool.*\(3, 3\).*int64", (GOOD,) * 3, {"exclude": IDS}),
        (ValueError, r"exclude .*\(3, 3\).*\(3, 4\)", (GOOD,) * 3, {"exclude": GOOD > 0}),
        (ValueError, r"own_rows .*dense", (GOOD[None],) * 2, {"own_rows": slice(0, 3)}),
        (ValueError, r"negative_keys .*got 3, expected 4", (GOOD, GOOD, GOOD[:, :3]), {}),
        (ValueError, r"negative_keys .*device.*meta", (GOOD, GOOD, GOOD.to("meta")), {}),
        (ValueError, r"temperature .*> 0.*got 0\.0", (GOOD, GOOD), {"temperature": 0}),
        (ValueError, r"temperature .*got -0\.1", (GOOD, GOOD), {"temperature": -0.1}),
        (ValueError, r"temperature .*got nan", (GOOD, GOOD), {"temperature": math.nan}),
        (ValueError, r"temperature .*got inf", (GOOD, GOOD), {"temperature": math.inf}),
        (TypeError, r"temperature .*'0\.1'", (GOOD, GOOD), {"temperature": "0.1"}),
        (TypeError, r"temperature .*True", (GOOD, GOOD), {"temperature": True}),
        (TypeError, r"temperature .*int64", (GOOD, GOOD), {"temperature": torch.tensor(1)}),
        (ValueError, r"temperature .*\(1,\)", (GOOD, GOOD), {"temperature": torch.ones(1)}),
        (ValueError, r"temperature .*got 0\.0", (GOOD, GOOD), {"temperature": torch.tensor(0.0)}),
        (
            ValueError,
            r"temperature .*device.*meta",
            (GOOD, GOOD),
            {"temperature": torch.ones((), device="meta")},
        ),
        (ValueError, r"reduction .*mean, sum, none.*'avg'", (GOOD, GOOD), {"reduction": "avg"}),
        (TypeError, r"own_rows .*slice.*got 1", (GOOD[:1], GOOD), {"own_rows": 1}),
        (TypeError, r"own_rows .*None, 2", (GOOD[:2], GOOD), {"own_rows": slice(2)}),
        (ValueError, r"own_rows .*stop <= 3.*1, 4", (GOOD, GOOD), {"own_rows": slice(1, 4)}),
        (ValueError, r"own_rows .*positive_key.*-1, 1", (GOOD, GOOD), {"own_rows": slice(-1, 1)}),
        (ValueError, r"own_rows .*2, 2", (GOOD[:1], GOOD), {"own_rows": slice(2, 2)}),
        (ValueError, r"own_rows .*0, 3, 2", (GOOD, GOOD), {"own_rows": slice(0, 3, 2)}),
        (ValueError, r"own_rows .*got 2, expected 1", (GOOD[:1], GOOD), {"own_rows": slice(0, 2)}),
        (ValueError, r"own_rows .*negative_keys", (GOOD,) * 3, {"own_rows": slice(0, 3)}),
        (
            ValueError,
            r"positive_key .*got 3, expected 4",
            (GOOD[:1], GOOD[:, :3]),
            {"own_rows": slice(0, 1)},
        ),
    ],
)
def test_info_nce_names_the_bad_argument(
    error: type[Exception], match: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        ops.info_nce(*arguments, **options)


def _supervised(keys: Tensor) -> Tensor:
    return ops.supervised_contrastive(GOOD, IDS, keys, IDS)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "z_a .*None", lambda: ops.nt_xent(None, GOOD)),
        (ValueError, r"z_b .*\(2, 4\).*\(3, 4\)", lambda: ops.nt_xent(GOOD, GOOD[:2])),
        (ValueError, "temperature .*got -1", lambda: ops.nt_xent(GOOD, GOOD, temperature=-1)),
        (ValueError, "reduction .*'x'", lambda: ops.nt_xent(GOOD, GOOD, reduction="x")),
        (ValueError, "own_rows .*z_a", lambda: ops.nt_xent(GOOD, GOOD, own_rows=slice(1, 9))),
        (TypeError, "image_features .*int64", lambda: ops.clip_loss(GOOD.long(), GOOD, 1.0)),
        (ValueError, "text_features .*meta", lambda: ops.clip_loss(GOOD, GOOD.to("meta"), 1.0)),
        (ValueError, r"logit_scale .*got 0\.0", lambda: ops.clip_loss(GOOD, GOOD, 0.0)),
        (ValueError, r"logit_scale .*\(2,\)", lambda: ops.clip_loss(GOOD, GOOD, torch.ones(2))),
        (ValueError, "z_a .*not empty", lambda: ops.nt_xent(GOOD[:0], GOOD[:0])),
        (TypeError, "z_b .*float64", lambda: ops.nt_xent(GOOD, GOOD.double())),
        (TypeError, "group .*'all'", lambda: ops.nt_xent(GOOD, GOOD, group="all")),
        (TypeError, "group .*3", lambda: ops.clip_loss(GOOD, GOOD, 1.0, group=3)),
        (ValueError, "text_features .*shape", lambda: ops.siglip_loss(GOOD, GOOD[:2], 1.0, 0.0)),
        (ValueError, "logit_scale .*-1", lambda: ops.siglip_loss(GOOD, GOOD, -1, 0)),
        (ValueError, "logit_bias .*nan", lambda: ops.siglip_loss(GOOD, GOOD, 1, math.nan)),
        (ValueError, r"logit_bias .*\(2,\)", lambda: ops.siglip_loss(GOOD, GOOD, 1, torch.ones(2))),
        (ValueError, "labels .*None", lambda: ops.supervised_contrastive(GOOD)),
        (TypeError, "labels .*float32", lambda: ops.supervised_contrastive(GOOD, GOOD[:, 0])),
        (ValueError, r"labels .*\(3,\).*\(2,\)", lambda: ops.supervised_contrastive(GOOD, IDS[:2])),
        (ValueError, "features .*1", lambda: ops.supervised_contrastive(GOOD[:1], IDS[:1])),
        (
            ValueError,
            "key_labels .*keys",
            lambda: ops.supervised_contrastive(GOOD, IDS, key_labels=IDS),
        ),
        (TypeError, "key_labels .*None", lambda: ops.supervised_contrastive(GOOD, IDS, GOOD)),
        (ValueError, "keys .*3, expected 4", lambda: _supervised(GOOD[:, :3])),
        (ValueError, "momentum .*got 1.5", lambda: ops.get_ema_multi_avg_fn(1.5)),
    ],
)
def test_the_other_losses_name_the_bad_argument(
    error: type[Exception], match: str, call: Any
) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: ops.nt_xent(x, y, return_rank=True),
        lambda x, y: ops.nt_xent(x, y, return_rank=True, own_rows=slice(0, 1)),
        lambda x, y: (ops.clip_loss(x, y, 5.0), torch.zeros(1)),
    ],
)
def test_a_pair_without_negatives_has_a_loss_and_gradients_of_0(loss: Any) -> None:
    x, y = (torch.randn(1, 4, requires_grad=True) for _ in range(2))
    value, rank = loss(x, y)
    value.backward()
    assert value.item() == 0 and rank.any().item() is False
    assert x.grad.count_nonzero() == y.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("error", "match", "targets", "sources", "momentum"),
    [
        (ValueError, "sources .*1 and 2", [GOOD, GOOD], [GOOD], 0.9),
        (ValueError, r"sources\[1\] .*\(2, 4\).*\(3, 4\)", [GOOD, GOOD], [GOOD, GOOD[:2]], 0.9),
        (ValueError, r"sources\[1\] .*meta", [GOOD, GOOD], [GOOD, GOOD.to("meta")], 0.9),
        (TypeError, r"sources\[1\] .*int64", [GOOD, GOOD], [GOOD, GOOD.long()], 0.9),
        (TypeError, r"targets\[1\] .*3", [GOOD, 3], [GOOD, GOOD], 0.9),
        (TypeError, r"targets\[1\] .*dense.*sparse", [GOOD, GOOD.to_sparse()], [GOOD, GOOD], 0.9),
        (ValueError, r"targets\[1\] .*overlap", [GOOD, GOOD[:1].expand(3, 4)], [GOOD, GOOD], 0.9),
        (ValueError, "momentum .*1.1", [GOOD], [GOOD], 1.1),
        (ValueError, "momentum .*nan", [GOOD], [GOOD], math.nan),
        (TypeError, "momentum .*'a'", [GOOD], [GOOD], "a"),
        (ValueError, r"momentum .*\(1,\)", [GOOD], [GOOD], torch.ones(1)),
    ],
)
def test_a_rejected_ema_changes_nothing(
    error: type[Exception], match: str, targets: list[Any], sources: list[Any], momentum: Any
) -> None:
    before = GOOD.clone()
    with pytest.raises(error, match=match):
        ops.ema_update_(targets, [s + 1 for s in sources], momentum)
    assert torch.equal(GOOD, before)


def test_an_ema_sees_what_changed_in_place_since_the_last_call() -> None:
    targets, sources = [torch.zeros(2, 3), torch.zeros(4)], [torch.ones(2, 3), torch.ones(4)]
    ops.ema_update_(targets, sources, 0.5)
    targets[1].data = torch.zeros(4)  # another storage, as loading or moving a model leaves
    ops.ema_update_(targets, sources, 0.5)
    assert torch.equal(targets[0], torch.full((2, 3), 0.75))
    assert torch.equal(targets[1], torch.full((4,), 0.5))
    sources[0].resize_(3, 2)
    with pytest.raises(ValueError, match=r"sources\[0\] .*\(3, 2\).*\(2, 3\)"):
        ops.ema_update_(targets, sources, 0.5)
    sources[0].data = torch.ones(2, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"sources\[0\] .*int32"):
        ops.ema_update_(targets, sources, 0.5)
    assert torch.equal(targets[0], torch.full((2, 3), 0.75))


def test_lists_that_an_ema_has_checked_are_checked_again_after_a_change() -> None:
    def fresh() -> tuple[list[Tensor], list[Tensor]]:
        return [torch.zeros(3) for _ in range(4)], [torch.ones(3) for _ in range(4)]

    ops.ema_update_(*fresh(), 0.5)
    targets, sources = fresh()  # other tensors of equal properties
    assert memory._known.find(sources + targets) is not None
    targets[1].data = targets[0].data  # tied now: updated once
    ops.ema_update_(targets, sources, 0.5)
    assert [t.tolist() for t in targets] == [[0.5] * 3] * 4
    targets[2].data = torch.zeros(3, dtype=torch.float16)
    targets[3].data = torch.zeros(6)[::2]
    ops.ema_update_(targets, sources, 0.25)
    assert targets[2].dtype == torch.float16
    assert [t.tolist() for t in targets] == [[0.875] * 3] * 2 + [[0.75] * 3] * 2
    with pytest.raises(ValueError, match=r"targets\[1\] .*overlap"):
        ops.ema_update_([targets[0], torch.zeros(1).expand(3)], sources[:2], 0.5)
    for name, freed in (("targets", targets), ("sources", sources)):
        targets[:], sources[:] = fresh()
        freed[3].untyped_storage().resize_(0)  # as FSDP frees parameters
        with pytest.raises(ValueError, match=rf"{name}\[3\] .*freed"):
            ops.ema_update_(targets, sources, 0.5)
        assert targets[0].tolist() == [0] * 3


@pytest.mark.parametrize("name", ["targets", "sources"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_that_its_storage_no_longer_holds_is_named(dtype: torch.dtype, name: str) -> None:
    for known in (False, True):
        targets, sources = (
            [torch.full((6,), value, dtype=dtype)[2:5] for _ in range(3)] for value in (0.0, 1.0)
        )
        if known:
            ops.ema_update_(targets, sources, 1.0)
        smaller = {"targets": targets, "sources": sources}[name][2]
        smaller.untyped_storage().resize_(4 * dtype.itemsize)
        with pytest.raises(ValueError, match=rf"{name}\[2\] .*smaller"):
            ops.ema_update_(targets, sources, 0.5)
        assert targets[0].tolist() == [0] * 3


@pytest.mark.filterwarnings("error")
def test_a_momentum_that_requires_grad_is_read_without_a_warning() -> None:
    targets, sources = [torch.zeros(3)], [torch.ones(3)]
    momentum = torch.tensor(0.5, requires_grad=True)
    torch.set_warn_always(True)  # PyTorch warns once a process by itself
    try:
        for expected in (0.5, 0.75):  # lists that are new, and lists that are known
            ops.ema_update_(targets, sources, momentum)
            assert targets[0].tolist() == [expected] * 3
    finally:
        torch.set_warn_always(False)


def test_the_lists_that_are_remembered_do_not_pile_up() -> None:
    for count in range(1, 40):
        ops.ema_update_([torch.zeros(2)] * count, [torch.ones(2)] * count, 0.5)
        targets = [torch.zeros(2) for _ in range(count)]
        ops.ema_update_(targets, [torch.ones(2) for _ in range(count)], 0.5)
        assert all(t.tolist() == [0.5, 0.5] for t in targets)
        assert len(memory._known._lists) <= LISTS


@pytest.mark.parametrize(
    ("error", "match", "pointer", "keys"),
    [
        (ValueError, "keys .*got 3, expected 4", torch.tensor([1]), GOOD[:, :3]),
        (TypeError, "keys .*int64", torch.tensor([1]), GOOD.long()),
        (ValueError, r"keys .*\(0, 4\)", torch.tensor([1]), GOOD[:0]),
        (TypeError, "pointer .*int32", torch.tensor([1], dtype=torch.int32), GOOD),
        (ValueError, r"pointer .*\(\)", torch.tensor(1), GOOD),
        (ValueError, "pointer .*meta", torch.ones(1, dtype=torch.int64, device="meta"), GOOD),
    ],
)
def test_a_rejected_enqueue_changes_nothing(
    error: type[Exception], match: str, pointer: Tensor, keys: Tensor
) -> None:
    queue = torch.ones(5, 4)
    before = queue.clone()
    with pytest.raises(error, match=match):
        ops.enqueue_(queue, pointer, keys)
    assert torch.equal(queue, before)


def test_a_queue_that_overlaps_itself_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"queue .*overlap"):
        ops.enqueue_(torch.zeros(1, 4).expand(5, 4), torch.tensor([0]), GOOD)
