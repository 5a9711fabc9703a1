"""Pretraining: the run and its loop, the step engine, checkpoints and run folders."""

from typing import TYPE_CHECKING

from mocofast.lazy import lazy_members

if TYPE_CHECKING:
    from mocofast.train.run import train

__all__ = ["train"]

__getattr__, __dir__ = lazy_members(__name__, {"run": ("train",)})
