"""Images that lie in a few large files, as a source that can be read in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mocofast.data.names import NamedImages
from mocofast.files import read_at

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedSource(NamedImages):
    """Images at known places of large files. `load` returns the content of an image file."""

    def __init__(
        self,
        files: Sequence[Path],
        places: np.ndarray,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """Takes the places of the images. Opens no file.

        files: the large files.
        places: (N, 3) int64: the number of the file, offset and length in bytes.
        names: N names. labels: (N,) integers that index `classes`, or None.
        """
        super().__init__(names, labels, classes)
        self._files, self._places = tuple(files), places

    def load(self, index: int) -> bytes:
        """Returns the content of an image file. Raises OSError if the large file has changed."""
        number, offset, size = self._places[index].tolist()
        # Reads at a position: threads and forked workers share no place in the file.
        with self._files[number].open("rb", buffering=0) as file:
            content = read_at(file.fileno(), size, offset)
        if len(content) < size:
            raise OSError(f"{self._files[number]} ends within {self.name(index)}: it changed")
        return content

    def paths(self) -> Iterator[str]:
        """Yields the paths of the large files."""
        return map(str, self._files)

    def subset(self, index: np.ndarray) -> Self:
        """Returns a source of some images. index: (n,) int64."""
        part = super().subset(index)
        part._places = self._places[index]
        return part
