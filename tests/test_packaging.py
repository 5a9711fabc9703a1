"""Tests the contents of wheel and sdist, the version, the pins, and the package name `kernels`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest

import mocofast
from mocofast import front

ROOT = Path(__file__).parent.parent
LIBRARIES = ("mocofast/data/_photometric", "mocofast_kernels/_compiled")  # optional
SHIPPED = (".py", ".yaml", ".typed", ".npz", ".css", ".js")
FILES = ("README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "Makefile")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of the files that a build reads.

    A build in the checkout itself leaves a folder build/, which the next wheel would ship.
    """
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", *FILES):
        shutil.copy(ROOT / name, copy)
    for name in ("mocofast", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> zipfile.ZipFile:
    """Returns the wheel that `pip install .` makes, built without a network."""
    pytest.importorskip(
        "setuptools",
        minversion="77",
        reason="building needs setuptools>=77 (pip install '.[test]')",
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--quiet", "--wheel-dir", "out"], cwd=checkout, check=True)
    (path,) = (checkout / "out").iterdir()
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"mocofast-{mocofast.__version__}.dist-info/{name}").decode()


def test_the_wheel_holds_the_packages_their_recipes_and_type_markers_and_nothing_else(
    checkout: Path, wheel: zipfile.ZipFile
) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    packages = [
        (checkout, "mocofast"),
        (checkout / "kernels", "mocofast_kernels"),
        (checkout / "benchmarks", "mocofast_bench"),
    ]
    paths = {
        path.relative_to(base) for base, package in packages for path in (base / package).rglob("*")
    }
    libraries = {name for name in files if name.startswith(LIBRARIES)}
    assert len(libraries) == (len(LIBRARIES) if shutil.which("cc") else 0)
    assert files - libraries == {path.as_posix() for path in paths if path.suffix in SHIPPED}
    assert {
        "mocofast/recipes/digits.yaml",
        *(f"{package}/py.typed" for _, package in packages),
    } <= files


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    assert "mocofast = mocofast.__main__:main" in metadata(wheel, "entry_points.txt")


def test_the_index_shows_what_the_package_is(wheel: zipfile.ZipFile) -> None:
    """`make dist` also renders the page, by twine."""
    about = Parser().parsestr(metadata(wheel, "METADATA"))
    page = about.get_payload()
    assert isinstance(page, str) and "$ mocofast pretrain PHOTOS" in page
    assert not re.search(r"\]\((?!https?:)", page), "an index has no files beside the page"
    minors = [*range(int(about["Requires-Python"].rpartition(".")[2]), 15)]
    said = [name for name in about.get_all("Classifier") or [] if "Python :: 3." in name]
    assert said == [f"Programming Language :: Python :: 3.{minor}" for minor in minors]


def test_the_sdist_rebuilds_and_tests_itself(checkout: Path, wheel: zipfile.ZipFile) -> None:
    build = "from setuptools import build_meta; print(build_meta.build_sdist('out-sdist'))"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    (path,) = (checkout / "out-sdist").iterdir()
    with tarfile.open(path) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = {"mocofast_kernels": "kernels", "mocofast_bench": "benchmarks"}
    parts = (name.partition("/") for name in wheel.namelist())
    shipped = {
        f"{folders[top]}/{top}/{rest}" if top in folders else f"{top}/{rest}"
        for top, _, rest in parts
    }
    built = (".dist-info/", *LIBRARIES)
    assert {name for name in shipped if not any(part in name for part in built)} <= files
    sources = {
        path.relative_to(checkout).as_posix()
        for folder in ("mocofast/data", "kernels/mocofast_kernels")
        for path in (checkout / folder).glob("*.[ch]")
    }
    assert {"mocofast/data/photometric.c", "kernels/mocofast_kernels/sweep.c"} <= sources <= files
    assert {"setup.py", "pyproject.toml", *FILES} <= files
    for folder in ("tests", "benchmarks"):
        assert {
            path.relative_to(checkout).as_posix() for path in (checkout / folder).rglob("*.py")
        } <= files


def test_a_machine_without_a_compiler_installs_all_but_the_library(
    checkout: Path, wheel: zipfile.ZipFile
) -> None:
    del wheel  # its build must not run at the same time
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "out-none"]
    env = {**os.environ, "CC": "/nowhere/cc"}
    shutil.rmtree(checkout / "build", ignore_errors=True)
    done = subprocess.run(build, cwd=checkout, env=env, capture_output=True, text=True, check=True)
    for name in (Path(library).name for library in LIBRARIES):
        assert name in done.stdout + done.stderr  # says what is missing
        assert not list((checkout / "out-none").rglob(f"{name}*"))


def test_the_version_is_the_same_in_a_wheel_and_in_a_bare_checkout(wheel: zipfile.ZipFile) -> None:
    # -S leaves out site-packages, where another copy may be installed.
    out = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "import mocofast; print(mocofast.__version__, mocofast.__file__)",
        ],
        env={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    version, path = out.strip().split(" ", 1)
    assert Path(path) == ROOT / "mocofast" / "__init__.py"
    assert (
        version == mocofast.__version__ == Parser().parsestr(metadata(wheel, "METADATA"))["Version"]
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_an_editable_installation_works_in_the_folder_above_the_clone(
    checkout: Path, tmp_path: Path
) -> None:
    """There the clone itself looks like a namespace package of the name `mocofast`."""
    (tmp_path / "mocofast").symlink_to(checkout, target_is_directory=True)
    build = "from setuptools import build_meta; build_meta.build_editable('editable')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=checkout, check=True, stdout=subprocess.DEVNULL
    )
    (path,) = (checkout / "editable").iterdir()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    # -S: without this machine's own installation.
    code = (
        "import sys, site; site.addsitedir('site')\n"
        "import mocofast, mocofast_kernels, mocofast_bench\n"
        "print(mocofast.__version__, mocofast.__file__)"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env={}, check=True, stdout=subprocess.PIPE)
    assert done.stdout.decode().split() == [
        mocofast.__version__,
        str(checkout / "mocofast/__init__.py"),
    ]


def test_pins_lie_in_the_ranges_of_setup_and_those_of_the_engine_are_the_oldest_allowed(
    wheel: zipfile.ZipFile,
) -> None:
    """The tests run with the oldest versions that `>=` allows.

    A pin of a package that setup.py does not require is a leftover.
    """
    requirements = pytest.importorskip("packaging.requirements")
    ranges: dict[str, set[str]] = {}
    for line in Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist"):
        required = requirements.Requirement(line)
        ranges.setdefault(required.name, set()).add(str(required.specifier))
    lines = (
        line.split("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    )
    pins = {pin.name: pin.specifier for pin in map(requirements.Requirement, filter(None, lines))}
    assert {"torch", "torchvision", "triton", "numpy"} <= pins.keys()
    for name, specifier in pins.items():
        assert name in ranges, f"constraints.txt pins {name}, which setup.py does not require"
        (allowed,) = ranges[name]
        (pin,) = specifier
        if pin.operator == "==":
            assert pin.version in requirements.SpecifierSet(allowed), (
                f"setup.py wants {name}{allowed}, not {pin}"
            )
        if name.startswith(("torch", "triton", "nvidia-dali")):
            assert f">={pin.version}".removesuffix(".0") == allowed, (
                f"{name}: tested with {pin}, promised {allowed}"
            )


def test_another_package_named_kernels_stays_importable_from_the_root(tmp_path: Path) -> None:
    """The folder `kernels/` must not hide Hugging Face's package `kernels`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    code = "import kernels, mocofast_kernels; print(kernels.owner, mocofast_kernels.__file__)"
    # The same order as in pytest and in a bare checkout.
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.strip() == f"somebody else {ROOT / 'kernels' / 'mocofast_kernels' / '__init__.py'}"


def without(*names: str) -> str:
    """Returns lines of Python that make packages look absent."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def test_the_ops_need_torch_and_numpy_alone(wheel: zipfile.ZipFile) -> None:
    needed = Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist") or []
    assert {re.split("[^a-z]", name)[0] for name in needed if "extra ==" not in name} == {
        "torch",
        "numpy",
    }
    ops = (
        "import torch\nfrom mocofast import ops\n"
        "x = torch.randn(4, 8, requires_grad=True)\n"
        "ops.info_nce(x, torch.randn(4, 8), torch.randn(9, 8)).backward()\n"
        "assert x.grad is not None"
    )
    absent = without(*front.TRAINING, "triton", "tensorboard")
    subprocess.run([sys.executable, "-c", absent + ops], cwd=ROOT, env=environment(), check=True)


def test_the_demo_needs_no_torchvision_and_other_runs_say_what_to_install(tmp_path: Path) -> None:
    """The demo also starts without the slow imports of torch.compile."""
    commands = (
        "from mocofast.cli import main\n"
        "assert main(['pretrain', '--train.max_steps', '2', '--train.dir', sys.argv[1]]) == 0\n"
        "slow = {'torch._dynamo', 'sympy', 'torch.distributed.fsdp'}\n"
        "assert not {*slow, 'triton'} & sys.modules.keys()\n"
        "from mocofast import settings\n"
        "from mocofast.models.encoders import TinyResNet\n"
        "from mocofast.train.threads import operations\n"
        "assert operations(TinyResNet(2), settings.load_recipe('digits')) > 10**8\n"
        "assert not slow & sys.modules.keys()\n"
        "sys.exit(main(['pretrain', '--model.arch', 'resnet18', '--train.dir', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", without("torchvision") + commands, tmp_path / "a", tmp_path / "b"],
        cwd=ROOT,
        # With a user's number of threads a run does not count operations.
        env={k: v for k, v in environment().items() if k != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "a/report.html").exists() and not (tmp_path / "b").exists()
    assert "needs the package torchvision" in done.stderr
    assert "pip install 'mocofast[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_digits_equal_those_of_scikit_learn() -> None:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(ROOT / "mocofast/data/digits.npz") as digits:
        assert np.array_equal(digits["images"], found.images)
        assert np.array_equal(digits["labels"], found.target)


def environment() -> dict[str, str]:
    """Returns the environment of a program that imports this checkout."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "benchmarks"))
    return os.environ | {"PYTHONPATH": paths}


@pytest.mark.skipif(sys.platform != "linux", reason="all builds for macOS are for CPUs")
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("torch", "torchvision", "installed"),
    [
        ("2.15.0, 2.14.0", "0.30.0", ""),
        # A torchvision for CUDA does not load beside a CPU build of torch.
        ("2.15.0, 2.13.0+cpu", "0.30.0", "torch==2.13.0+cpu -e .[demo]"),
        (
            "2.15.0, 2.13.0+cpu, 2.12.0+cpu, 2.11.0",
            "0.30.0, 0.28.0+cpu",
            "torch==2.13.0+cpu torchvision==0.28.0+cpu -e .[train]",
        ),
    ],
)
def test_a_setup_for_cpus_takes_the_newest_cpu_builds_or_says_where_they_are(
    tmp_path: Path, torch: str, torchvision: str, installed: str
) -> None:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*"index versions torch") echo "Available versions: {torch}";;\n'
        f'*"index versions torchvision") echo "Available versions: {torchvision}";;\n'
        '*) echo "$@" >> asked;; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", "CPU=1", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    asked = (tmp_path / "asked").read_text()
    assert (done.returncode == 0) == bool(installed), done.stderr
    assert installed in asked and ("install" in asked) == bool(installed)
    assert ("PIP_EXTRA_INDEX_URL=" in done.stdout) == ("cpu" not in torchvision)
    assert (tmp_path / ".venv/ready").exists() == bool(installed)
