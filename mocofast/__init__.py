"""Fast momentum-contrast pretraining. Importing this package is light: its members load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocofast import ops
    from mocofast.methods.moco import MoCo

__all__ = ["MoCo", "__version__", "ops"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "MoCo":
        from mocofast.methods.moco import MoCo

        return MoCo
    if name == "ops":
        import importlib

        return importlib.import_module("mocofast.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
