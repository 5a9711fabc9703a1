"""The formats that `mocofast export` writes."""

FORMATS = (
    *("torchvision", "timm", "detectron2", "reference", "safetensors"),
    *("transformers", "onnx", "torch_export", "text"),
)
