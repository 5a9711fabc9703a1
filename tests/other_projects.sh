#!/usr/bin/env bash
# Installs other projects, each into a folder of its own, for tests/test_other_projects.py:
#
#     tests/other_projects.sh FOLDER && MOCOFAST_PROJECTS=FOLDER python -m pytest tests/test_other_projects.py
#
# Takes 1 GB. --no-deps keeps torch and torchvision of this environment.
set -eu
mkdir -p "$1"
cd "$1"

packages() {  # PROJECT PACKAGE...
    python -m pip install -q --no-deps --target "$1/packages" "${@:2}"
}

checkout() {  # PROJECT OWNER/NAME COMMIT
    git clone -q "https://github.com/$2" "$1/checkout"
    git -C "$1/checkout" checkout -q "$3"
}

checkout moco facebookresearch/moco 7397dfe146c7ca6bbb58e9c382498069178ba764
checkout moco-v3 facebookresearch/moco-v3 c349e6e
packages moco-v3 timm==0.4.12
checkout solo-learn vturrisi/solo-learn 9187ea3
packages solo-learn lightning==2.6.6 omegaconf==2.4.0 torchmetrics==1.9.0 einops==0.8.2
checkout dino facebookresearch/dino 7c446df
checkout dinov2 facebookresearch/dinov2 b8931f7
packages dinov2 omegaconf==2.4.0
packages torchgeo torchgeo==0.8.1 lightning==2.6.6 kornia==0.9.0 kornia_rs==0.2.0 \
    segmentation-models-pytorch==0.6.0 geopandas==1.2.0 pyproj==3.7.2 pyogrio==0.13.0 \
    rasterio==1.4.4 affine==3.0.1 cligj==0.7.2 click-plugins==1.1.1.2 shapely==2.2.0 \
    jsonargparse==4.53.0 typeshed-client==2.15.0 docstring-parser==0.18.0 \
    torchmetrics==1.9.0 einops==0.8.2
packages mmpretrain mmpretrain==1.2.0 mmengine==0.10.7 mmcv-lite==2.2.0 addict==2.4.0 \
    yapf==0.43.0 termcolor==3.3.0 mat4py==0.6.0 model-index ordered-set importlib_metadata==7.2.1 zipp \
    einops==0.8.2 opencv-python-headless transformers==4.41.2 tokenizers==0.19.1 \
    huggingface-hub==0.25.2
checkout mmselfsup open-mmlab/mmselfsup db861f3
packages mmselfsup mmcls==1.0.0rc6 mmengine==0.10.7 mmcv-lite==2.0.1 addict==2.4.0 yapf==0.43.0 \
    termcolor==3.3.0 mat4py==0.6.0 model-index ordered-set einops==0.8.2 opencv-python-headless
packages vissl vissl==0.1.6 classy_vision==0.7.0 fairscale==0.4.13 fvcore iopath \
    hydra-core==1.3.2 yacs portalocker tabulate parameterized submitit cloudpickle termcolor
