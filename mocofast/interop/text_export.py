"""Exports the text encoder of CLIP as a folder of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from mocofast.interop.hugging_face import new_folder, save_parts
from mocofast.methods.clip import CLIP

PROJECTIONS = "projections.safetensors"


def write_texts(model: CLIP, out: Path) -> int:
    """Writes the text model, its tokenizer, and both projections. Returns the number of tensors.

    out: a new folder. `projections.safetensors` holds `image` (C, D), for pooled features of the
    image encoder, `logit_scale` () (1 / T), and, where the model has no projection inside, `text`
    (C, W), for its pooled states.
    """
    tower = model.text_q
    tensors = {"image": model.image_projection().weight, "logit_scale": model.eval().scale()}
    if tower.projection is not None:
        tensors["text"] = tower.projection.weight
    with new_folder(out) as made:
        save_parts(made, tower.model, model.tokenizer)
        safetensors.torch.save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            made / PROJECTIONS,
        )
    return len(tower.model.state_dict()) + len(tensors)


def text_lines(model: CLIP, out: Path) -> str:
    """Returns Python lines that load the folder and compare a text with an image."""
    inside = model.text_q.projection is None
    kind = "CLIPTextModelWithProjection" if inside else "AutoModel"
    embed = "model(input_ids=tokens).text_embeds"
    if not inside:
        embed = "model(input_ids=tokens, attention_mask=...).pooler_output @ p['text'].T"
    length = model.tokenize([""]).shape[1]
    return "\n".join(
        [
            "from safetensors.torch import load_file",
            f"from transformers import AutoTokenizer, {kind}",
            f"p = load_file({str(out / PROJECTIONS)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
            f"model = {kind}.from_pretrained({str(out)!r}).eval()",
            f'options = {{"padding": "max_length", "truncation": True, "max_length": {length}}}',
            'tokens = tokenizer(["a photo of a cat."], return_tensors="pt", **options).input_ids',
            f"text = {embed}",
            "# features: (N, D), pooled features of the exported image encoder",
            "# cosines: normalize(features @ p['image'].T) @ normalize(text).T",
        ]
    )
