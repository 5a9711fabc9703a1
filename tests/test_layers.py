"""Imports point downwards, form no cycles, and load nothing heavy for a user of the ops alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "mocofast": ROOT,
    "mocofast_kernels": ROOT / "kernels",
    "mocofast_bench": ROOT / "benchmarks",
}

# Each room (a folder, or a module beside the folders) may import from lower floors and from itself.
FLOORS = [
    {"mocofast_kernels"},
    {"mocofast.lazy"},
    {"mocofast"},  # the package itself: its version, and lazy names
    {"mocofast.completion", "mocofast.errors", "mocofast.interrupts", "mocofast.option"},
    {
        "mocofast.log_format",
        "mocofast.memory",
        "mocofast.openmp",
        "mocofast.plugins",
        "mocofast.usage",
        "mocofast.view_sizes",
    },
    {"mocofast.data_config"},
    {
        "mocofast.config",
        "mocofast.device",
        "mocofast.files",
        "mocofast.plots",
        "mocofast.rendezvous",
        "mocofast.shares",
        "mocofast.step_parts",
        "mocofast.yaml_files",
    },
    {"mocofast.distributed", "mocofast.ops", "mocofast.settings"},
    {"mocofast.data", "mocofast.launch", "mocofast.models", "mocofast.optim"},
    {"mocofast.evaluate", "mocofast.methods"},
    {"mocofast.health"},
    {"mocofast.report"},
    {"mocofast.train"},
    {"mocofast.interop"},
    {
        "mocofast_bench",
        "mocofast.api",
        "mocofast.doctor",
        "mocofast.front",
        "mocofast.network",
        "mocofast.parser",
        "mocofast.study",
    },
    {
        "mocofast.detection",
        "mocofast.evaluation_arguments",
        "mocofast.fit_command",
        "mocofast.run_commands",
    },
    {"mocofast.evaluation_commands", "mocofast.image_commands"},
    {"mocofast.report_commands"},
    {"mocofast.cli"},
    {"mocofast.__main__"},
]


def room(module: str) -> str:
    """Returns the folder of a module, or the module itself if it stands beside the folders."""
    package, _, rest = module.partition(".")
    return f"{package}.{rest.split('.')[0]}" if package == "mocofast" and rest else package


def floor(module: str) -> int:
    """Returns the number of the module's floor in FLOORS, from the bottom."""
    found = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert found, f"{module} stands on no floor; give {room(module)} a place in FLOORS"
    return found[0]


def modules() -> dict[str, Path]:
    """Returns every module of the three packages, {name: path}. A package is its `__init__`."""
    found = {}
    for package, base in PACKAGES.items():
        for path in (base / package).rglob("*.py"):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields every statement that may run: all statements outside `if TYPE_CHECKING:` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node)


def imports(module: str, known: dict[str, Path]) -> set[str]:
    """Returns the modules that `module` imports directly, anywhere in the file.

    `import a.b.c` also runs the `__init__` of a and of a.b, so a and a.b count, too.
    """
    named = set()
    path = known[module]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the layer"
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    loaded = {
        ".".join(name.split(".")[: i + 1]) for name in named for i in range(name.count(".") + 1)
    }
    return loaded & known.keys() - {module}


def test_imports_point_downwards() -> None:
    known = modules()
    assert len(known) > 100
    for module in known:
        for imported in imports(module, known):
            assert room(imported) == room(module) or floor(imported) < floor(module), (
                f"{module} imports {imported}, whose floor is not below"
            )


def test_there_are_no_import_cycles() -> None:
    known = modules()
    graph = {module: imports(module, known) for module in known}
    while graph:
        leaves = [module for module, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for module in leaves:
            del graph[module]


def test_an_import_of_a_package_counts_its_init(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("from a import c\nfrom a.d import e\n")
    known = dict.fromkeys(("a", "a.c", "a.d", "x.b"), tmp_path / "b.py")
    assert imports("x.b", known) == {"a", "a.c", "a.d"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_files_stay_readable(module: str) -> None:
    lines = modules()[module].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{module} is long; split it"


def test_every_folder_says_what_it_is_for() -> None:
    for module, path in modules().items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert text and text.split("\n")[0].endswith("."), (
                f"{module}: say in one sentence what it is for"
            )


def test_importing_the_ops_is_light() -> None:
    code = (
        "import sys, mocofast, mocofast.ops\n"
        "heavy = {'triton', 'nvidia.dali', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard',\n"
        "         'yaml'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_the_folders_of_packages_are_no_packages(name: str) -> None:
    """A package named `kernels` at the root would hide Hugging Face's package of this name."""
    assert not (ROOT / name / "__init__.py").exists()
