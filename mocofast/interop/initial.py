"""Warm starts: gives a new method the weights of a file, `mocofast pretrain --init FILE`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.config import ConfigError
from mocofast.interop.layouts import MOMENTUM, find_encoder, method_part
from mocofast.interop.reading import is_ours, read_any, tensors_of
from mocofast.interop.reference_checkpoints import check_heads, load_backbone
from mocofast.methods.base import Method
from mocofast.methods.clip import CLIP
from mocofast.models.encoders import head_name
from mocofast.train.finite import check_finite


def initialise(method: Method, path: str, arch: str) -> list[str]:
    """Loads the encoders of a file into a new method, and a queue where it fits.

    path: a run folder, a checkpoint of mocofast, or a file of another project (see
        docs/checkpoints.md).
    arch: `model.arch` of the method.
    The momentum encoder takes the file's momentum encoder, or else the query encoder. A head or a
    queue of other sizes stays new.

    Returns lines that say what was taken and what is new. Raises FileNotFoundError, and
    ConfigError for a file without the weights of the encoder. After an error nothing is loaded.
    """
    content, file = read_any(path)
    try:
        weights = method_part(tensors_of(content["model"] if is_ours(content) else content))
        check_finite(weights, str(file))
        encoder = find_encoder(weights, arch)
        check_heads(method.encoder_q, encoder, file)
        query = encoder.weights
        load_backbone(method.encoder_q, query, arch)
    except ConfigError as error:
        text = str(error).removeprefix(f"{file}: ")
        raise ConfigError(f"--init {path}: {text}") from error
    taken, new = ["encoder"], list[str]()
    (taken if _load_head(method.encoder_q, query) else new).append("head")

    key = getattr(method, "encoder_k", None)
    if isinstance(key, nn.Module):
        key.load_state_dict(method.encoder_q.state_dict())
        own = next((found for prefix in MOMENTUM if (found := _under(prefix, weights))), None)
        if own:
            own = find_encoder(own, arch).weights
            load_backbone(key, own, arch)
            _load_head(key, own)
            taken.append("momentum encoder")
    if isinstance(method, CLIP):
        (taken if _load_texts(method, weights) else new).append("text encoder")
    queue = getattr(method, "queue", None)
    if isinstance(queue, Tensor):
        (taken if _load_queue(method, queue, weights, is_ours(content)) else new).append("queue")
    line = f"weights of {path}: {', '.join(taken)}"
    return [line + (f"; new: {', '.join(new)}" if new else "")]


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


def _load_head(encoder: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Loads the head if all of its entries are there and fit. Returns whether it was loaded."""
    head = encoder.get_submodule(head_name(encoder))
    given = _under(f"{head_name(encoder)}.", weights)
    return _load_if_fitting(head, given) and bool(given)


def _load_if_fitting(module: nn.Module, given: Mapping[str, Tensor]) -> bool:
    """Loads a module if all of its entries are there and fit. Returns whether it was loaded."""
    wanted = module.state_dict()
    if {n: t.shape for n, t in given.items()} != {n: t.shape for n, t in wanted.items()}:
        return False
    module.load_state_dict(given)
    return True


@torch.no_grad()
def _load_texts(method: CLIP, weights: Mapping[str, Tensor]) -> bool:
    """Loads the text encoder and the temperature if they fit. Returns whether they were loaded."""
    query, key = _under("text_q.", weights), _under("text_k.", weights)
    if not _load_if_fitting(method.text_q, query):
        return False
    if method.towers:
        _load_if_fitting(method.text_k, key or query)
    if (scale := weights.get("logit_scale")) is not None:
        method.logit_scale.copy_(scale)
    return True


@torch.no_grad()
def _load_queue(method: Any, queue: Tensor, weights: Mapping[str, Tensor], ours: bool) -> bool:
    """Loads queue and pointer if they fit. Returns whether they were loaded.

    ours: the queue of the file is (K, C). Queues of others are (C, K), apart from those of
        `mocofast.MoCo` in another loop.
    """
    given, pointer = weights.get("queue"), weights.get("queue_ptr")
    if isinstance(method, CLIP):  # a queue of texts, and one of images: both are filled anew
        return False
    if given is None or pointer is None or given.dim() != 2 or pointer.numel() != 1:
        return False
    given = given.t() if not ours and given.t().shape == queue.shape else given
    if given.shape != queue.shape:
        return False
    queue.copy_(given)
    method.queue_ptr.copy_(pointer.view(1))
    return True
