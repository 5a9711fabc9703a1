"""Exports ResNets and ViTs as folders of Hugging Face transformers, with a model card."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.interop.layouts import Rules, renamed
from mocofast.interop.loading_lines import channel_statistics
from mocofast.view_sizes import pixels_text

_RESNET: Rules = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)
_VIT: Rules = (
    (r"^class_token$", "embeddings.cls_token"),
    (r"^encoder\.pos_embedding$", "embeddings.position_embeddings"),
    (r"^conv_proj\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.ln\.", "layernorm."),
    (r"^encoder\.layers\.encoder_layer_", "layers."),
    (r"\.ln_1\.", ".layernorm_before."),
    (r"\.ln_2\.", ".layernorm_after."),
    (r"\.self_attention\.out_proj\.", ".attention.o_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def write_folder(
    backbone: Mapping[str, Tensor],
    encoder: nn.Module,
    config: Config,
    checkpoint: Mapping[str, Any],
    out: Path,
) -> int:
    """Writes config.json, model.safetensors, preprocessor_config.json and README.md.

    backbone: the weights without head, under torchvision's names.
    checkpoint: tells the epoch.
    out: a new folder. It appears when all files are written.
    Returns the number of tensors. Raises ConfigError for other encoders, for a folder that exists,
    and if transformers is missing.
    """
    try:
        from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel
    except ImportError as error:
        raise ConfigError(
            "format: transformers needs the package: pip install 'mocofast[export]'"
        ) from error
    with torch.device("meta"):
        if config.model.arch.startswith("vit_"):
            model = ViTModel(ViTConfig(**_vit_options(encoder, config)), add_pooling_layer=False)
            weights = _split_attention(renamed(backbone, _VIT))
        else:
            model = ResNetModel(ResNetConfig(**_resnet_options(encoder, config)))
            weights = renamed(backbone, _RESNET)
    model.load_state_dict(weights, assign=True)
    with new_folder(out) as made:
        save_parts(made, model, _processor(config))
        (made / "README.md").write_text(_card(config, checkpoint, out), encoding="utf-8")
    return len(weights)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write, which becomes `out` when the block ends.

    Raises ConfigError for a folder that exists.
    """
    if out.exists():
        raise ConfigError(f"out: expected a new folder for transformers' files, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def save_parts(folder: Path, *parts: Any) -> None:
    """Saves a model, and its processor or tokenizer, without transformers' progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        for part in parts:
            part.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def check_transformers(arch: str, layer_scale: float) -> None:
    """Raises ConfigError for an encoder that transformers' ResNet and ViT do not describe."""
    plain = re.fullmatch(r"resnet(18|34|50|101|152)|vit_\w+", arch)
    if plain is None or layer_scale:
        what = f"{arch} with layer_scale" if plain else arch
        raise ConfigError(
            f"format: transformers is for resnet18 to resnet152 and ViTs, got model.arch {what}; "
            "onnx and safetensors work"
        )


def transformers_lines(config: Config, out: Path) -> str:
    """Returns Python lines that load the folder and compute features."""
    is_vit = config.model.arch.startswith("vit_")
    given = ", add_pooling_layer=False" if is_vit else ""
    part = "last_hidden_state[:, 0]" if is_vit else "pooler_output.flatten(1)"
    return "\n".join(
        [
            "from transformers import AutoImageProcessor, AutoModel",
            f"processor = AutoImageProcessor.from_pretrained({str(out)!r})",
            f"model = AutoModel.from_pretrained({str(out)!r}{given}).eval()",
            'inputs = processor(image, return_tensors="pt")    # image: a PIL image',
            f"features = model(**inputs).{part}",
        ]
    )


def _split_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Splits packed projections into query, key and value."""
    found = {}
    for name, value in weights.items():
        place, packed, kind = name.partition(".self_attention.in_proj_")
        if packed:
            for letter, part in zip("qkv", value.chunk(3)):
                found[f"{place}.attention.{letter}_proj.{kind}"] = part.contiguous()
        else:
            found[name] = value
    return found


def _vit_options(encoder: Any, config: Config) -> dict[str, Any]:
    blocks = list(encoder.encoder.layers)
    return {
        "hidden_size": encoder.hidden_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].num_heads,
        "intermediate_size": blocks[0].mlp[0].out_features,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": config.data.channels,
        "layer_norm_eps": encoder.encoder.ln.eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }


def _resnet_options(encoder: Any, config: Config) -> dict[str, Any]:
    stages = [encoder.get_submodule(f"layer{stage}") for stage in (1, 2, 3, 4)]
    bottleneck = hasattr(stages[0][0], "conv3")
    return {
        "num_channels": config.data.channels,
        "embedding_size": encoder.conv1.out_channels,
        "hidden_sizes": [64 * 2**i * (4 if bottleneck else 1) for i in range(4)],
        "depths": [len(stage) for stage in stages],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,  # torchvision strides in the 3x3 convolution
    }


def _processor(config: Config) -> Any:
    """Returns the processor that makes the central crop of the evaluation.

    With views that are no squares, it does so for images of about the shape of the views.
    """
    from transformers import BitImageProcessor

    height, width = config.augment.shape
    mean, std = channel_statistics(config)
    return BitImageProcessor(
        size={"shortest_edge": round(min(height, width) * 256 / 224)},
        crop_size={"height": height, "width": width},
        resample=2,  # bilinear
        image_mean=mean,
        image_std=std,
        do_convert_rgb=config.data.channels == 3,
    )


def _card(config: Config, checkpoint: Mapping[str, Any], out: Path) -> str:
    """Returns the model card."""
    m, o = config.model, config.optim
    mean, std = channel_statistics(config)
    rows = {
        "Method": m.method,
        "Encoder": m.arch,
        "Recipe": config.recipe,
        "Epochs": checkpoint.get("epoch", "unknown"),
        "Batch": config.data.batch_size,
        "Optimiser": f"{o.name}, learning rate {o.lr:g}, weight decay {o.weight_decay:g}",
        "Images": f"{config.data.channels} channels, {pixels_text(config.augment.size)} pixels, "
        f"mean {mean}, std {std}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n"
        f"tags: [self-supervised, {m.method}, mocofast]\n---\n\n"
        f"# {m.arch}, pretrained with {m.method}\n\n"
        "The encoder was trained without labels by mocofast. The model gives features. It has no "
        "classifier.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"```python\n{transformers_lines(config, Path(out.name))}\n```\n\n"
        "The training images and their licence are not known to this card: add both before you "
        "publish the model.\n"
    )
