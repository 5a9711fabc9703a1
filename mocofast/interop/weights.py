"""Weights under the names of other projects.

facebookresearch/moco: `encoder_q.*`, `encoder_k.*`, `queue` (C, K) float32, `queue_ptr` (1,). In
its checkpoint files the weights are under "state_dict", with DistributedDataParallel's prefix
`module.`.
torchvision: the names of the encoder itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mocofast.interop.reading import described_names
from mocofast.methods.base import Method
from mocofast.methods.moco import MoCo
from mocofast.models.heads import head_names

PREFIX = "module."
COMPILED = "_orig_mod."


def unwrapped(model: Any) -> Any:
    """Returns the model inside torch.compile and DistributedDataParallel, in any order."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule
            model = model._orig_mod
        else:
            return model


def load_reference_state_dict(model: MoCo, state_dict: Mapping[str, Any]) -> None:
    """Loads weights of facebookresearch/moco into `model`, compiled, wrapped by DDP, or neither.

    state_dict: a state dict or a whole checkpoint. The queue is converted to the model's dtype.
    Raises ValueError with up to five entries that are missing, unknown or of a wrong shape, and
    their numbers. After an error nothing is loaded.
    """
    given = {
        name.removeprefix(PREFIX): value
        for name, value in state_dict.get("state_dict", state_dict).items()
    }
    expected = to_reference_state_dict(model)
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"missing {described_names(missing)}")
    if unknown := sorted(given.keys() - expected.keys()):
        problems.append(f"unknown {described_names(unknown)}")
    wrong = []
    for name in sorted(expected.keys() & given.keys()):
        if not isinstance(given[name], Tensor):
            wrong.append(f"{name} is a {type(given[name]).__name__} instead of a tensor")
        elif given[name].shape != expected[name].shape:
            wrong.append(
                f"{name} is {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            )
    if wrong:
        problems.append(described_names(wrong))
    if problems:
        raise ValueError(f"state_dict: not that of this model: {'; '.join(problems)}")
    model = unwrapped(model)
    ours = {name.replace(COMPILED, ""): name for name in model.state_dict()}
    given = {ours[name]: value for name, value in given.items()}
    model.load_state_dict({**given, "queue": given["queue"].t()})


def to_reference_state_dict(model: MoCo) -> dict[str, Tensor]:
    """Returns the state dict of `model` in facebookresearch/moco's layout, without `module.`.

    model: compiled, wrapped by DistributedDataParallel, or neither.
    As with `state_dict()`, tensors may share memory with the model.
    """
    named = unwrapped(model).state_dict().items()
    state = {name.replace(COMPILED, ""): value for name, value in named}
    return {**state, "queue": state["queue"].float().t().contiguous()}


def backbone_state_dict(model: Method, head: bool = False) -> dict[str, Tensor]:
    """Returns the state dict of the query encoder under the encoder's own names.

    head: whether to include the head (`fc.*` or `heads.*`), which gives embeddings, not classes.
    """
    encoder = unwrapped(unwrapped(model).encoder_q)
    prefixes = tuple(f"{name}." for name in head_names(encoder))
    return {
        name: value
        for name, value in encoder.state_dict().items()
        if head or not name.startswith(prefixes)
    }
