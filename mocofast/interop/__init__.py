"""Exchange with other projects: weights, checkpoints and command lines."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.interop.weights import (
        backbone_state_dict,
        load_reference_state_dict,
        to_reference_state_dict,
    )

__all__ = ["backbone_state_dict", "load_reference_state_dict", "to_reference_state_dict"]

__getattr__, __dir__ = lazy_members(__name__, {"weights": tuple(__all__)})
