# docker build -t mocofast .                                   with CUDA
# docker build -t mocofast --build-arg EXTRAS=train \
#     --build-arg PIP_INDEX_URL=... .                           an index with CPU builds of PyTorch
# docker run --gpus all --ipc host -v /data:/data -w /data mocofast pretrain /data/photos
FROM python:3.12-slim

# A compiler builds the loops of the views. Debian's releases of the compiler do not matter.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=cuda13
ARG PIP_INDEX_URL
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[${EXTRAS}]" \
    && rm -rf /src

# Run folders belong to this user. `docker run --user` takes another.
RUN useradd --create-home --uid 1000 moco
USER 1000
ENTRYPOINT ["mocofast"]
