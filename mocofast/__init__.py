"""Fast momentum-contrast pretraining. Its members load on first use, so importing is light."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast import interop, ops, optim
    from mocofast.methods.moco import MoCo

__all__ = ["MoCo", "__version__", "interop", "ops", "optim"]

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_members(
    __name__, {"methods.moco": ("MoCo",), "interop": (), "ops": (), "optim": ()}
)
