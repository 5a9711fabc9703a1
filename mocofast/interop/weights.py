"""Weights in the names and layouts of other projects.

facebookresearch/moco: `encoder_q.*`, `encoder_k.*`, `queue` (C, K) float32, `queue_ptr` (1,); in its checkpoint files
under "state_dict" and behind the prefix `module.` of DistributedDataParallel. torchvision: an encoder's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mocofast.methods.base import Method
from mocofast.methods.moco import MoCo
from mocofast.models.encoders import head_name

PREFIX = "module."


def load_reference_state_dict(model: MoCo, state_dict: Mapping[str, Any]) -> None:
    """Loads a state dict, or a whole checkpoint that holds one, of facebookresearch/moco into `model`.

    A queue dtype of the model's that is smaller than float32 rounds the queue. Raises ValueError naming the entries
    that are missing, unknown or of another shape than the model's; nothing is loaded then.
    """
    given = {
        name.removeprefix(PREFIX): value
        for name, value in state_dict.get("state_dict", state_dict).items()
    }
    expected = to_reference_state_dict(model)
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"missing {', '.join(missing)}")
    if unknown := sorted(given.keys() - expected.keys()):
        problems.append(f"unknown {', '.join(unknown)}")
    for name in expected.keys() & given.keys():
        if not isinstance(given[name], Tensor):
            problems.append(f"{name} is a {type(given[name]).__name__} instead of a tensor")
        elif given[name].shape != expected[name].shape:
            problems.append(
                f"{name} is {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            )
    if problems:
        raise ValueError(f"state_dict: not that of this model: {'; '.join(problems)}")
    model.load_state_dict({**given, "queue": given["queue"].t()})


def to_reference_state_dict(model: MoCo) -> dict[str, Tensor]:
    """The state dict of `model` as facebookresearch/moco's MoCo has it, without `module.`.

    As with `state_dict()`, the tensors may share memory with the model's.
    """
    state = model.state_dict()
    return {**state, "queue": state["queue"].float().t().contiguous()}


def backbone_state_dict(model: Method, head: bool = False) -> dict[str, Tensor]:
    """The query encoder in its own names, those of torchvision for a torchvision encoder.

    head: also the layers of the embedding (`fc.*` or `heads.*`), whose shapes are the method's, not a classifier's.
    """
    encoder = model.encoder_q
    prefix = f"{head_name(encoder)}."
    return {
        name: value
        for name, value in encoder.state_dict().items()
        if head or not name.startswith(prefix)
    }
