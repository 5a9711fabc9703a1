"""Who may import whom: downwards only, no cycles, and nothing heavy where a user only wants the ops."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each module may import only from lower layers, or its own.
LAYERS = [
    ("mocofast_kernels",),
    (
        "mocofast",
        "mocofast.ops",
        "mocofast.autograd",
        "mocofast.config",
        "mocofast.distributed",
        "mocofast.files",
        "mocofast.parts",
    ),
    ("mocofast.fused_blocks", "mocofast.normalization", "mocofast.vit"),
    ("mocofast.settings",),
    ("mocofast.encoders", "mocofast.sync_batch_norm"),
    (
        "mocofast.schedule",
        "mocofast.data",
        "mocofast.plots",
        "mocofast.progress",
    ),
    ("mocofast.methods",),
    ("mocofast.optim", "mocofast.interop"),
    ("mocofast.checkpoint", "mocofast.interrupt", "mocofast.runfolder", "mocofast.step", "mocofast.engine"),
    ("mocofast.profile",),
    ("mocofast.evaluate", "mocofast.export", "mocofast.bench", "mocofast.reference_files"),
    ("mocofast.monitor", "mocofast.resume"),
    ("mocofast.train",),
    ("mocofast.doctor", "mocofast.reference_flags", "mocofast.study"),
    ("mocofast.cli",),
    ("mocofast.__main__",),
]


def layer(module: str) -> int:
    names = [(i, name) for i, layer in enumerate(LAYERS) for name in layer]
    fits = [
        (len(name), i)
        for i, name in names
        if module == name or (module.startswith(name + ".") and name != "mocofast")
    ]
    assert fits, f"{module} stands in no layer; give it a place in LAYERS"
    return max(fits)[1]


def modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for top in ("mocofast", "mocofast_kernels"):
            for path in (base / top).rglob("*.py"):
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the layer"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return (found & known.keys()) - {"mocofast"}  # the package itself: its version, and lazy names


def test_imports_point_downwards() -> None:
    known = modules()
    assert len(known) > 20
    for module, path in known.items():
        if module == "mocofast":  # loads its members lazily, from any layer
            continue
        for imported in imports(path, known):
            assert layer(imported) <= layer(module), f"{module} imports {imported}, which stands above it"


def test_there_are_no_import_cycles() -> None:
    known = modules()
    graph = {module: imports(path, known) - {module} for module, path in known.items()}
    del graph["mocofast"]
    while graph:
        leaves = [module for module, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for module in leaves:
            del graph[module]


def test_files_stay_readable() -> None:
    for module, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, f"{module} is long; split it"


def test_importing_the_ops_is_light() -> None:
    code = (
        "import sys, mocofast, mocofast.ops\n"
        "heavy = {'triton', 'nvidia.dali', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard', 'yaml'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


def test_hugging_faces_kernels_package_stays_importable() -> None:
    """A package named `kernels` at the root would hide PyPI's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
