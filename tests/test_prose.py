"""Docstrings and pages are plain, and tests/prose.py counts correctly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import prose

PLACES = prose.places()


@pytest.mark.parametrize(
    "place", PLACES, ids=lambda place: place.relative_to(prose.ROOT).as_posix()
)
def test_prose_is_plain(place: Path) -> None:
    found = prose.measure(place)
    assert found.words > 50, "nothing was measured"
    assert found.back_references_per_100_words <= 3, str(found)
    assert found.semicolons_per_sentence <= 0.05, str(found)
    assert not found.long_lines, str(found)


def test_lines_of_c_are_no_longer_than_those_of_python() -> None:
    sources = [
        file for name in ("mocofast", "kernels") for file in (prose.ROOT / name).rglob("*.[ch]")
    ]
    assert len(sources) > 10
    lines = [(file, line) for file in sources for line in file.read_text("utf-8").splitlines()]
    assert not [(file.name, line) for file, line in lines if len(line) > prose.COLUMNS]


def test_few_lines_are_kept_from_the_formatter() -> None:
    kept = prose.unformatted([place for place in PLACES if place.is_dir()])
    assert len(kept) < 20, kept


def test_every_page_and_package_is_a_place() -> None:
    names = {place.name for place in PLACES}
    assert {"mocofast", "kernels", "benchmarks", "tests"} <= names
    assert {"README.md", "CHANGELOG.md", "log.md", "scaling.md", "study.md"} <= names


@pytest.mark.parametrize(
    ("text", "words", "back_references", "sentences", "semicolons"),
    [
        ("Returns the loss.", 3, 0, 1, 0),
        # "That", "its", "so" and "it" point back. Capitals count too.
        ("That is its loss; so it is.", 7, 4, 1, 1),
        # "bones", "another", "sore" only contain words of the list.
        ("Another bones sore.", 3, 0, 1, 0),
        # Two words are no sentence. An empty line and a full stop end a sentence.
        ("(N, C)\n\nfirst line\nsecond line. Third one here.", 9, 1, 2, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_words_and_sentences_are_counted(
    text: str, words: int, back_references: int, sentences: int, semicolons: int
) -> None:
    found = prose.Measure()
    found.add(text)
    assert (found.words, found.back_references) == (words, back_references)
    assert (found.sentences, found.semicolons) == (sentences, semicolons)


def test_measures_are_ratios() -> None:
    found = prose.Measure(words=200, back_references=7, sentences=40, semicolons=3)
    assert found.back_references_per_100_words == 3.5
    assert found.semicolons_per_sentence == 0.075


def test_only_docstrings_of_python_files_are_prose(tmp_path: Path) -> None:
    lines = [
        '"""Module of that kind."""',
        "# those; these",
        'TEXT = "its; such"',
        "class Pair:",
        '    """Two of them; no more."""',
        "    def first(self):",
        '        """Returns one of the two."""',
        "x" * 100,
        "y" * 101,
    ]
    (tmp_path / "pair.py").write_text("\n".join(lines))
    found = prose.measure(tmp_path)
    assert (found.words, found.back_references, found.semicolons) == (14, 3, 1)
    assert found.long_lines == ["pair.py:9"]


def test_tables_and_code_blocks_of_a_page_are_no_prose(tmp_path: Path) -> None:
    lines = [
        "# A page",
        "",
        "Text that counts; " + "x" * 100,
        "| those | " + "y" * 100 + " |",
        "```console",
        "$ echo such; " + "z" * 100,
        "```",
    ]
    page = tmp_path / "page.md"
    page.write_text("\n".join(lines))
    found = prose.measure(page)
    assert (found.words, found.back_references, found.semicolons) == (6, 1, 1)
    assert found.long_lines == ["page.md:3", "page.md:6"]


def test_lines_kept_from_the_formatter_are_found(tmp_path: Path) -> None:
    kept = ["# fmt: " + "skip", "# fmt: " + "off"]
    (tmp_path / "table.py").write_text(f"A = 1  {kept[0]}\nB = 2\n{kept[1]}\nC = 3  # format\n")
    assert prose.unformatted([tmp_path]) == ["table.py:1", "table.py:3"]
