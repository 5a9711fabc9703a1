"""Fast momentum-contrast pretraining. Its members load on first use, so importing is light."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast import interop, ops, optim
    from mocofast.api import Trained, load, pretrain
    from mocofast.methods.moco import MoCo

__all__ = ["MoCo", "Trained", "__version__", "interop", "load", "ops", "optim", "pretrain"]

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_members(
    __name__,
    {
        "api": ("Trained", "load", "pretrain"),
        "methods.moco": ("MoCo",),
        "interop": (),
        "ops": (),
        "optim": (),
    },
)
