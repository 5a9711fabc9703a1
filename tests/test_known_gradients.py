"""The mean of `info_nce` starts its own backward pass, and is a tensor like others in all else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mocofast import ops
from mocofast.ops import backend, known_gradients
from tests.oracle import info_nce_oracle


@pytest.fixture(params=[{"cpu"}, set()], ids=["filled", "known"], autouse=True)
def filled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch fills the gradient with 1. In the second case CPUs do as GPUs."""
    monkeypatch.setattr(known_gradients, "_FILLED", request.param)


def _features() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, positive, negatives = (torch.randn(n, 8, generator=generator) for n in (5, 5, 20))
    return query.requires_grad_(), positive, negatives


def _gradient(query: Tensor, run: Callable[[], object]) -> Tensor:
    query.grad = None
    run()
    assert query.grad is not None
    return query.grad


# {way to begin: factor of the gradient}
WAYS: dict[str, tuple[Callable[[Tensor], object], float]] = {
    "plain": (lambda loss: loss.backward(), 1),
    "given": (lambda loss: loss.backward(torch.tensor(3.0)), 3),
    "by name": (lambda loss: loss.backward(gradient=torch.tensor(3.0), retain_graph=True), 3),
    "twice": (lambda loss: (loss.backward(retain_graph=True), loss.backward()), 2),
    "function": (torch.autograd.backward, 1),
    "scaled": (lambda loss: (loss * 4).backward(), 4),
    "in place": (lambda loss: loss.mul_(4).add_(1).backward(), 4),
    "halved": (lambda loss: loss.register_hook(lambda g: g / 2) and loss.backward(), 0.5),
    "written by a hook": (lambda x: x.register_hook(lambda g: g.mul_(2)) and x.backward(), 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_begin_gives_the_gradient(way: str) -> None:
    run, factor = WAYS[way]
    query, positive, negatives = _features()
    exact = info_nce_oracle(query.double(), positive, negatives, 0.1).mean()
    (expected,) = torch.autograd.grad(exact, query)
    for begin, scale in ((run, factor), (WAYS["plain"][0], 1)):  # the next call is not disturbed
        got = _gradient(query, lambda begin=begin: begin(ops.info_nce(query, positive, negatives)))
        torch.testing.assert_close(got, scale * expected, rtol=1e-5, atol=1e-7)


def test_a_plain_backward_multiplies_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, positive, negatives = _features()
    monkeypatch.setattr(known_gradients, "_FILLED", set())
    kernels, found = backend.backend_for("cpu"), []

    def forward(*arguments: object, **options: object) -> object:
        found.append(kernels.infonce_forward(*arguments, **options))
        return found[-1]

    replaced = kernels._replace(infonce_forward=forward)
    monkeypatch.setattr(backend, "backend_for", lambda device_type: replaced)
    hidden = query.clone()
    hidden.register_hook(found.append)
    ops.info_nce(hidden, positive, negatives).backward()
    result, gradient = found
    assert gradient is result.grad_query


def test_the_mean_is_saved_shown_and_used_as_a_plain_tensor() -> None:
    query, positive, negatives = _features()
    loss = ops.info_nce(query, positive, negatives)
    value = loss.item()
    assert f"{loss:.3f}" == f"{value:.3f}"
    assert repr(loss).startswith(f"tensor({value:.4f}, grad_fn=")
    for derived in (loss * 2, 1 - loss, loss + loss, loss.detach(), torch.stack([loss, loss])):
        assert type(derived) is Tensor
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    for saved in (torch.load(file, weights_only=True)["loss"], pickle.loads(pickle.dumps(loss))):
        assert type(saved) is Tensor and saved.item() == value
    # The backend aot_eager refuses subclasses: none where there are no launches to save.
    assert (type(loss) is Tensor) == ("cpu" in known_gradients._FILLED)
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
    assert compiled(loss).item() == pytest.approx(2 * value + 1)
    loss.retain_grad()
    loss.backward()
    assert loss.grad is not None
    loss.grad.zero_()
    assert ops.unit_gradient(loss.device).item() == 1
