"""The errors of configurations and of runs that diverge, and words for messages of errors."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A recipe, option or value cannot be used. The message names it and says what was expected."""


class NothingDecodedError(ConfigError):
    """No image of a set can be decoded."""


class DivergedError(RuntimeError):
    """A run has lost its weights: loss or weights are not finite. The message says what to do.

    step: the first step, counted from 1, whose loss is not finite, or None if no loss is known.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class UnreachableError(OSError):
    """Images cannot be read at present: a server or a storage gives no proper answer."""


def printable(text: str) -> str:
    """Returns a text with control characters, and bytes that are no text, as escapes like \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    # Python's names of files hold a byte that is no text as U+DC80 to U+DCFF.
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def describe_error(error: BaseException) -> str:
    """Returns the name of the error's class and the error's message: "OSError: disk full"."""
    return f"{type(error).__name__}: {error}"


def list_choices(names: Sequence[str]) -> str:
    """Returns names as words of a sentence: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def torchvision_way_out() -> str:
    """Returns the command that installs torchvision beside this torch.

    pip's own index has builds for CUDA alone, which do not load beside a CPU build of torch.
    """
    from importlib.metadata import version

    torch = version("torch")
    if not torch.endswith("+cpu"):
        return "pip install 'mocofast[train]' installs all packages of the commands"
    index = "https://download.pytorch.org/whl/cpu"
    return f"pip install torch=={torch} torchvision --extra-index-url {index}"
