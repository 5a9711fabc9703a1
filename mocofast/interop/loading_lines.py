"""Python lines and commands that load an exported file in its own library."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mocofast.config import Config
from mocofast.models.encoders import SOLO
from mocofast.models.libraries import TIMM, timm_arguments
from mocofast.models.vit import SIZES


def how_to_load(format: str, config: Config, encoder: nn.Module, out: Path) -> str:
    """Returns Python lines, or a command of the other project, that load `out`.

    format: one of the formats of single files.
    encoder: of the model. Tells sizes that its name does not tell.
    """
    if format == "reference":
        return _reference_command(config, str(out))
    if format == "detectron2":
        return _detectron2_options(config, encoder, str(out))
    lines = _constructor(format == "timm", config, encoder)
    path = str(out)
    if out.suffix == ".safetensors":
        lines[0] += ", safetensors.torch"
        lines += [f"model.load_state_dict(safetensors.torch.load_file({path!r}))"]
    else:
        lines += [f"model.load_state_dict(torch.load({path!r}))"]
    return "\n".join([*lines, images_line(config)])


def images_line(config: Config) -> str:
    """Returns a comment that says which images the encoder takes."""
    channels = config.data.channels
    mean, std = channel_statistics(config)
    images = "RGB" if channels == 3 else f"{channels} channels"
    range_ = "from 0 to 1" + ("" if channels == 3 else " (uint8 / 255, uint16 / 65535)")
    return f"# images: {images} {range_}, normalised with mean {mean} and std {std}"


def channel_statistics(config: Config) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of every channel, of pixels from 0 to 1."""
    parts = config.augment.mean, config.augment.std
    mean, std = (list(part * config.data.channels if len(part) == 1 else part) for part in parts)
    return mean, std


def _is_of_torchvision(arch: str) -> bool:
    if arch in SIZES or arch == "resnet_tiny":  # the demo does without torchvision
        return False
    from torchvision.models import list_models

    return arch in list_models()


def _reference_command(config: Config, path: str) -> str:
    m = config.model
    if config.data.channels == 3 and _is_of_torchvision(m.arch):
        mlp = " --mlp" if m.mlp else ""
        return (
            f"python main_moco.py --arch {m.arch} --resume {path} "
            f"--moco-dim {m.dim} --moco-k {m.queue_size}{mlp} ..."
            "    # facebookresearch/moco"
        )
    # main_moco.py cannot build this encoder.
    return (
        f"import torch, mocofast.interop\n"
        f"mocofast.interop.load_reference_state_dict(model, torch.load({path!r}))"
        "    # model: a mocofast.MoCo"
    )


def _detectron2_options(config: Config, encoder: nn.Module, path: str) -> str:
    """Returns options of detectron2, whose defaults build a ResNet-50.

    RES2_OUT_CHANNELS is 64 for ResNet-18 and 34. WIDTH_PER_GROUP is of the 3x3 convolutions of
    res2.
    """
    mean, std = ([round(255 * v, 3) for v in part] for part in channel_statistics(config))
    stages = [encoder.get_submodule(f"layer{stage}") for stage in (1, 2, 3, 4)]
    blocks = [len(list(stage.children())) for stage in stages]
    first = encoder.get_submodule("layer1.0")
    is_bottleneck = hasattr(first, "conv3")
    conv = encoder.get_submodule("layer1.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    resnets = {"DEPTH": sum(blocks) * (3 if is_bottleneck else 2) + 2}
    if not is_bottleneck:
        resnets["RES2_OUT_CHANNELS"] = conv.out_channels
    elif conv.groups > 1 or conv.out_channels != 64:
        resnets["NUM_GROUPS"] = conv.groups
        resnets["WIDTH_PER_GROUP"] = conv.out_channels // conv.groups
    options = [f"MODEL.WEIGHTS {path}"]
    options += ["INPUT.FORMAT RGB"] * (config.data.channels == 3)
    options += [f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}"]
    options += [f"MODEL.RESNETS.{name} {value}" for name, value in resnets.items()]
    options += ["MODEL.RESNETS.STRIDE_IN_1X1 False    # options of detectron2"]
    return " ".join(options)


def _constructor(by_timm: bool, config: Config, encoder: nn.Module) -> list[str]:
    """Returns lines that make the untrained `model`, without head. The first line imports."""
    arch, channels, size = config.model.arch, config.data.channels, config.augment.size
    if arch.startswith(TIMM):
        name = arch.removeprefix(TIMM).partition(":")[0]
        arguments = timm_arguments(name, size, channels)
        arguments = {k: v for k, v in arguments.items() if (k, v) != ("in_chans", 3)}
        if config.model.layer_scale:
            arguments["init_values"] = config.model.layer_scale
        given = "".join(f", {key}={value!r}" for key, value in arguments.items())
        return ["import torch, timm", f'model = timm.create_model("{name}", num_classes=0{given})']
    is_vit = arch.startswith("vit_")
    inputs = "" if channels == 3 else f", in_chans={channels}"
    if by_timm and is_vit:
        blocks = list(encoder.get_submodule("encoder.layers").children())
        width, heads = encoder.hidden_dim, blocks[0].num_heads
        scale = f", init_values={config.model.layer_scale}" if config.model.layer_scale else ""
        return [
            "import torch, timm.models",
            f"model = timm.models.VisionTransformer({size}, {encoder.patch_size}{inputs}, "
            f"num_classes=0, embed_dim={width}, depth={len(blocks)}, num_heads={heads}{scale})",
        ]
    plain = arch.replace(SOLO, "_cifar").removesuffix("_cifar")
    is_cifar = plain != arch and arch not in SIZES
    if by_timm:
        lines = [
            "import torch, timm",
            f'model = timm.create_model("{plain}", num_classes=0{inputs})',
        ]
    elif (
        config.model.layer_scale
        or not _is_of_torchvision(plain)
        or (is_vit and not isinstance(size, int))  # torchvision's ViTs take squares alone
    ):
        inputs = "" if channels == 3 else f", {channels}"
        scale = f", layer_scale={config.model.layer_scale}" if config.model.layer_scale else ""
        made = f'build_encoder("{arch}", {size}{inputs}{scale})(num_classes=1)'
        return [
            "import torch",
            "from mocofast.models.encoders import build_encoder, replace_head",
            f"model = {made}; replace_head(model, torch.nn.Identity())",
        ]
    else:
        head, given = ("heads", f"image_size={size}") if is_vit else ("fc", "")
        lines = [
            "import torch, torchvision",
            f"model = torchvision.models.{plain}({given}); model.{head} = torch.nn.Identity()",
        ]
    if is_cifar:
        padding = 2 if arch.endswith(SOLO) else 1
        lines += [
            f"model.conv1 = torch.nn.Conv2d({channels}, 64, 3, padding={padding}, bias=False); "
            "model.maxpool = torch.nn.Identity()"
        ]
    elif not by_timm and channels != 3:
        lines += [_first_convolution(arch, channels)]
    return lines


def _first_convolution(arch: str, channels: int) -> str:
    """Returns a Python line that gives torchvision's model another first convolution."""
    from mocofast.models.encoders import build_encoder

    with torch.device("meta"):
        encoder = build_encoder(arch, channels=channels)(num_classes=1)
    name = "conv_proj" if arch.startswith("vit_") else "conv1"
    conv = encoder.get_submodule(name)
    assert isinstance(conv, torch.nn.Conv2d)
    sizes = f"{conv.out_channels}, {conv.kernel_size}, {conv.stride}, {conv.padding}"
    return f"model.{name} = torch.nn.Conv2d({channels}, {sizes}, bias={conv.bias is not None})"
