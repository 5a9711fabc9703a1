#!/usr/bin/env bash
# timm's `pretrained_cfg["classifier"]` names the layer that gives classes. Code that transfers
# weights drops this layer and expects the keys of `create_model(name, num_classes=0)`. In some
# families timm removes more than the named layer without classes: the BatchNorm before it (LeViT,
# EfficientViT of MSRA, RepViT, SHViT), or a hidden layer and its norm (CAFormer: `head.fc.fc2` is
# named, `head.fc.fc1` and `head.fc.norm` go, too). InceptionNeXt has a hidden layer of the same
# kind (`head.fc2` is named), and there `head.fc1` and `head.norm` stay. So neither the name nor the
# kind of the head says what "without classes" means: features of `num_classes=0` are the input of
# the named layer in InceptionNeXt, and not in the others.
#
# Seen on 2026-11-30, Linux x86_64, Python 3.11, timm 1.0.31, torch 2.11.0. Keys that go beside
# those of the named layers:
#   caformer_s18         head.fc.fc1.bias head.fc.fc1.weight head.fc.norm.bias head.fc.norm.weight
#   inception_next_atto  none
#   efficientvit_m0      5 of head.bn
#   levit_128s           10 of head.bn, head_dist.bn
#   repvit_m0_9          10 of head.head.bn, head.head_dist.bn
#   shvit_s1             5 of head.bn
#   resnet18             none
# The script fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 torchvision==0.26.0 timm==1.0.31 "numpy<2.4"
"$folder/venv/bin/python" - <<'PYTHON'
import timm
import torch

expected = {
    "caformer_s18": {
        "head.fc.fc1.bias", "head.fc.fc1.weight", "head.fc.norm.bias", "head.fc.norm.weight"
    },
    "inception_next_atto": set(),
    "efficientvit_m0": {"head.bn"},
    "levit_128s": {"head.bn", "head_dist.bn"},
    "repvit_m0_9": {"head.head.bn", "head.head_dist.bn"},
    "shvit_s1": {"head.bn"},
    "resnet18": set(),
}
for name, modules in expected.items():
    with torch.device("meta"):  # shapes alone, no numbers
        model, headless = timm.create_model(name), timm.create_model(name, num_classes=0)
    named = model.pretrained_cfg["classifier"]
    named = (named,) if isinstance(named, str) else tuple(named)
    gone = set(model.state_dict()) - set(headless.state_dict())
    beside = sorted(key for key in gone if not key.startswith(tuple(f"{n}." for n in named)))
    print(f"{name:20} {', '.join(named):40} {' '.join(beside) or 'none'}")
    found = {key.rpartition(".")[0] if ".bn." in key else key for key in beside}
    assert found == modules, (name, found, modules)
PYTHON
