"""Exports an encoder as a graph that runs without its Python code: ONNX and torch.export."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mocofast.config import Config, ConfigError
from mocofast.errors import describe_error
from mocofast.interop.loading_lines import images_line
from mocofast.models.encoders import features

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}


class FeatureModel(nn.Module):
    """Returns features (N, D) float32, of normalised images (N, C, S, S)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return features(self.encoder, images)


def write_graph(format: str, encoder: nn.Module, config: Config, file: Path) -> None:
    """Writes the encoder, without head, as a graph for any number of images.

    format: a key of SUFFIXES.
    Raises ConfigError if packages are missing, or if the encoder is no graph.
    """
    example = torch.randn(2, config.data.channels, *config.augment.shape)
    model = FeatureModel(encoder).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = {"images": {0: torch.export.Dim("batch")}}
            program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
            if format == "torch_export":
                with file.open("w+b") as opened:  # torch warns of names that do not end in .pt2
                    torch.export.save(program, opened)
                return
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                verbose=False,  # no lines of progress
            )
            assert exported is not None
            # A file of protobuf holds 2 GB at most.
            large = sum(p.nbytes for p in model.parameters()) > 1.9e9
            exported.save(file, external_data=large)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"format: {format} needs {error.name}: pip install 'mocofast[export]'"
        ) from error
    except PermissionError:
        raise
    except Exception as error:
        said = describe_error(error).splitlines()[0][:300]
        raise ConfigError(
            f"format: {format} cannot take model.arch {config.model.arch} ({said}); safetensors "
            "works"
        ) from error


def graph_lines(format: str, config: Config, out: Path) -> str:
    """Returns Python lines that load the graph."""
    path = str(out)
    if format == "onnx":
        lines = [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({path!r})",
            "features = session.run(None, {'images': images})[0]    # float32, NumPy",
        ]
    else:
        lines = ["import torch", f"model = torch.export.load({path!r}).module()"]
    return "\n".join([*lines, images_line(config)])
