"""Measures how plainly docstrings and Markdown pages are written.

    python -m tests.prose [PATH ...]

PATH: a folder, a Python file or a Markdown page. Default: all places in tests/test_prose.py.
In Python files only docstrings count as prose. In Markdown pages tables and code blocks are left
out.

Three numbers are measured:

- Back-references per 100 words, the words of BACK_REFERENCE. The reader has to search for the noun.
- Semicolons a sentence. Two sentences read better than two halves of a sentence.
- Lines over 100 columns, rows of Markdown tables left out. Wider lines do not fit beside a second
  window.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = 100
BACK_REFERENCE = re.compile(
    r"\b(that|those|these|one|ones|others?|each|both|them|it|its|such|so)\b", re.IGNORECASE
)
WORD = re.compile(r"[A-Za-z']+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
FENCED_CODE = re.compile(r"```.*?```", re.DOTALL)
UNFORMATTED = re.compile(r"# fmt: (?:skip|off)\b")


@dataclass
class Measure:
    """Counts over the prose of one place. `long_lines` are "file:number"."""

    words: int = 0
    back_references: int = 0
    sentences: int = 0
    semicolons: int = 0
    long_lines: list[str] = field(default_factory=list)

    def add(self, prose: str) -> None:
        """Counts one docstring or one page. A sentence has at least three words."""
        self.words += len(WORD.findall(prose))
        self.back_references += len(BACK_REFERENCE.findall(prose))
        self.sentences += sum(len(text.split()) > 2 for text in SENTENCE_END.split(prose))
        self.semicolons += prose.count(";")

    @property
    def back_references_per_100_words(self) -> float:
        return 100 * self.back_references / max(1, self.words)

    @property
    def semicolons_per_sentence(self) -> float:
        return self.semicolons / max(1, self.sentences)

    def __str__(self) -> str:
        shown = ", ".join(self.long_lines[:8]) + (", ..." if len(self.long_lines) > 8 else "")
        return (
            f"{self.back_references_per_100_words:.2f} back-references per 100 words, "
            f"{self.semicolons_per_sentence:.3f} semicolons a sentence, "
            f"{len(self.long_lines)} lines over {COLUMNS} columns {shown}".rstrip()
        )


def docstrings(source: str) -> Iterator[str]:
    """Yields the docstrings of a Python file: of the module, of its classes and functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds):
            text = ast.get_docstring(node)
            if text:
                yield text


def page_prose(markdown: str) -> str:
    """Returns a Markdown page without tables and fenced code blocks."""
    lines = FENCED_CODE.sub("", markdown).splitlines()
    return "\n".join(line for line in lines if not is_table_row(line))


def is_table_row(line: str) -> bool:
    """Returns whether a Markdown line is a row of a table. Rows cannot be wrapped."""
    return line.lstrip().startswith("|")


def sources(place: Path) -> list[Path]:
    """Returns the Python files of a folder. A file is returned alone."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def measure(place: Path) -> Measure:
    """Measures a folder, a Python file or a Markdown page."""
    found = Measure()
    for path in sources(place):
        text = path.read_text("utf-8")
        is_page = path.suffix == ".md"
        for prose in [page_prose(text)] if is_page else docstrings(text):
            found.add(prose)
        found.long_lines += [
            f"{path.name}:{number}"
            for number, line in enumerate(text.splitlines(), start=1)
            if len(line) > COLUMNS and not (is_page and is_table_row(line))
        ]
    return found


def places(root: Path = ROOT) -> list[Path]:
    """Returns the folders and pages with goals for their prose."""
    folders = [root / name for name in ("mocofast", "kernels", "benchmarks", "tests", "examples")]
    pages = [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]
    return [*folders, *pages]


def unformatted(folders: Sequence[Path]) -> list[str]:
    """Returns "file:number" of every line with a `fmt: skip` or `fmt: off`."""
    return [
        f"{path.name}:{number}"
        for folder in folders
        for path in sources(folder)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if UNFORMATTED.search(line)
    ]


def main(arguments: Sequence[str]) -> None:
    """Prints a line per place, then the number of lines with a `fmt: skip`."""
    chosen = [Path(argument) for argument in arguments] or places()
    for place in chosen:
        print(f"{place.relative_to(ROOT) if place.is_absolute() else place}: {measure(place)}")
    kept = unformatted([place for place in chosen if place.suffix != ".md"])
    print(f"{len(kept)} lines with a `fmt: skip`")


if __name__ == "__main__":
    main(sys.argv[1:])
