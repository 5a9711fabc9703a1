"""Text towers of image-text methods: a transformer that reads bytes, or a model from a folder.

The models are those of Hugging Face transformers (`pip install 'mocofast[text]'`). Nothing is
downloaded, and no code of a folder runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mocofast.errors import ConfigError, describe_error

# Ids of ByT5's tokenizer (Xue et al. 2021, arXiv:2105.13626): byte b is b + FIRST_BYTE.
PAD, END, FIRST_BYTE = 0, 1, 3
VOCABULARY = FIRST_BYTE + 256
HEAD_WIDTH = 64  # of a head of attention, as in CLIP's text transformer

# Returns the ids (N, L) int64 of N texts, on the CPU.
Tokenize = Callable[[Sequence[str]], Tensor]


class TextTower(nn.Module):
    """A model of texts, and its projection to the embedding.

    model: a transformers model. CLIP's text model has the projection inside.
    pad: id of the padding, which the model does not see.
    dim: C, dimension of the embedding.
    """

    model: Any

    def __init__(self, model: nn.Module, pad: int, dim: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad
        self.projection: nn.Linear | None = None
        if not hasattr(model, "text_projection"):
            self.projection = nn.Linear(self.model.config.hidden_size, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns embeddings (N, C) of texts. tokens: (N, L) int64, of `Texts.tokenize`."""
        if self.projection is None:  # every place sees earlier places alone, the end sees all
            embeds: Tensor = self.model(input_ids=tokens).text_embeds
            return embeds
        seen = tokens != self.pad
        output = self.model(input_ids=tokens, attention_mask=seen.long())
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            states = output.last_hidden_state * seen[..., None]
            pooled = states.sum(1) / seen.sum(1, keepdim=True)
        projected: Tensor = self.projection(pooled)
        return projected


class Texts(NamedTuple):
    """A text tower, the tokenizer of its texts, and what `save` writes for the tokenizer."""

    tower: TextTower
    tokenize: Tokenize
    tokenizer: Any  # of transformers


class ByteTokenizer:
    """The bytes of texts in UTF-8, with ByT5's ids. Needs no vocabulary.

    length: L, tokens of a text. Longer texts are cut, shorter texts padded.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns ids (N, L) int64. The end is the last id of every text."""
        tokens = np.full((len(texts), self.length), PAD, dtype=np.int64)
        for row, text in zip(tokens, texts):
            content = text.encode(errors="replace")[: self.length - 1]
            row[: len(content)] = np.frombuffer(content, np.uint8)
            row[: len(content)] += FIRST_BYTE
            row[len(content)] = END
        return torch.from_numpy(tokens)


def byte_texts(width: int, layers: int, length: int, dim: int) -> Texts:
    """Returns CLIP's text transformer with random weights, over bytes (arXiv:2103.00020, 2.4).

    width: of the transformer. layers: number of blocks. length: L, most bytes of a text and one.
    """
    library = _transformers()
    heads = max(1, width // HEAD_WIDTH)
    if width % heads:
        raise ConfigError(f"model.text_width: expected a multiple of {HEAD_WIDTH}, got {width}")
    config = library.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        pad_token_id=PAD,
        bos_token_id=PAD,
        eos_token_id=END,
    )
    tower = TextTower(library.CLIPTextModelWithProjection(config), PAD, dim)
    return Texts(tower, ByteTokenizer(length), library.ByT5Tokenizer(extra_ids=0))


def folder_texts(folder: str, length: int, dim: int) -> Texts:
    """Returns the text model and the tokenizer of a folder in the form of transformers.

    folder: config.json, the files of the tokenizer, and model.safetensors. Without weights, the
        model starts from random weights. Of a whole CLIP model, the text model is taken.
    length: most tokens of a text, at most as many as the model has positions.
    Raises ConfigError for another kind of folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model.text: expected a folder with a config.json, got {folder!r}")
    library = _transformers()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = library.AutoConfig.from_pretrained(folder, **local)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, **local)
        is_clip = config.model_type in ("clip", "clip_text_model")
        config = getattr(config, "text_config", config)
        config.projection_dim = dim
        for name, value in vars(config).items():
            if "dropout" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # contrastive training has none
        kind = library.CLIPTextModelWithProjection if is_clip else library.AutoModel
        if any(Path(folder).glob("*.safetensors")):
            model = kind.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a projection to another dimension starts anew
                dtype=torch.float32,
                **local,
            )
        else:
            model = kind(config) if is_clip else kind.from_config(config)
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no token for padding")
        length = min(length, getattr(config, "max_position_embeddings", length))
        tower = TextTower(model, tokenizer.pad_token_id, dim)

        def tokenize(texts: Sequence[str]) -> Tensor:
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            ids: Tensor = tokenizer(list(texts), return_tensors="pt", **options).input_ids
            return ids

        with torch.no_grad():
            tower(tokenize(["a text"]))
    except Exception as error:  # transformers raises nearly any exception
        first = describe_error(error).splitlines()[0]
        raise ConfigError(
            f"model.text: {folder!r} has no text model of transformers with a tokenizer ({first})"
        ) from error
    return Texts(tower, tokenize, tokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model.method: clip needs transformers ({error}); pip install 'mocofast[text]'"
        ) from error
    return transformers
