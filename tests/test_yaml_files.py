"""Recipes in YAML: every wrong file is an error in words that names the line, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from mocofast import cli, settings, yaml_files
from mocofast.config import ConfigError

WRONG = {
    "lists in lists": (b"model: " + b"[" * 20000 + b"]" * 20000, "line 1: "),
    "groups in groups": (b"optim: " + b"{a: " * 2000, "line 1: more than 8 levels"),
    "digits": (b"optim:\n  lr: " + b"9" * 5000, "line 2: a value of 5000 characters"),
    "overflow": (b"optim:\n  lr: 1" + b"0" * 400, "line 2: optim.lr: expected float, got 1000"),
    "whole number": (b"\ntrain:\n  epochs: " + b"9" * 400, "line 3: train.epochs: expected int"),
    "Latin-1": (
        b"# x\nmodel:\n  arch: caf\xe9",
        "line 3: expected text in UTF-8, got the byte 0xe9",
    ),
    "UTF-16": ("optim:\n  lr: 1".encode("utf-16"), "line 1: expected text in UTF-8"),
    "many options": (
        b"optim:\n" + b"".join(b"  lr%d: 1\n" % i for i in range(50_000)),
        "expected at most 262,144 bytes, got 638,897",
    ),
    "fewer options": (
        b"optim:\n" + b"".join(b"  lr%d: 1\n" % i for i in range(20_000)),
        "line 2: unknown option 'optim.lr0'",
    ),
    "twice": (b"optim:\n  lr: 1\n  lr: 2", "line 3: lr stands here a second time"),
    "references": (b"optim:\n  lr: &a 1\n  momentum: *a", r"line 3: .* the reference \*a"),
    "unknown": (b"optim:\n  lr: 1\n  lrr: 2", "line 3: unknown option 'optim.lrr'; did you mean"),
    "group": (b"optim:\n  lr: 1\nloop:\n  lr: 2", "line 3: unknown group 'loop'"),
    "type": (b"optim:\n  momentum: 1\n  lr: [1, 2]", "line 3: optim.lr: expected float, got"),
    "a list": (b"optim: [1]", "line 1: expected options, got a list"),
    "a word": (b"optim", "line 1: expected groups of options, got 'optim'"),
    "no day": (b"recipe: 2020-99-99", "line 1: month must be"),
    "code": (b"train: !!python/object/apply:os.system {a: b}", "line 1: "),
    "zeros": (b"optim:\x00", "not a YAML file"),
    "open bracket": (b"optim:\n  lr: [1", "line 3: not a YAML file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_an_error_that_names_the_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = WRONG[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(ConfigError, match=said) as raised:
        settings.load_recipe(str(path))
    assert time.process_time() - began < 2
    assert str(raised.value).startswith(str(path)) and len(str(raised.value)) < 400
    assert cli.main(["pretrain", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_good_files_read_as_before(tmp_path: Path) -> None:
    for name in settings.recipes():
        values = settings.to_dict(settings.load_recipe(name))
        text = yaml.safe_dump(values)
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert settings.to_dict(settings.load_recipe(str(path))) == values
        assert yaml_files.read(text.encode(), "x")[0] == yaml.safe_load(text)
    assert yaml_files.read(b"", "x") == ({}, {})
    assert yaml_files.read(b"\xef\xbb\xbfoptim:\n", "x")[0] == {"optim": {}}


def test_lines_are_those_of_the_file() -> None:
    text = b"# x\nrecipe: mine\n\noptim:\n  lr: 1\n  # y\n  betas: [1,\n    2]\n  name: x"
    assert yaml_files.read(text, "x")[1] == {
        "recipe": 2,
        "optim": 4,
        "optim.lr": 5,
        "optim.betas": 7,
        "optim.name": 9,
    }
