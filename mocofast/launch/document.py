"""YAML documents that a person reads."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes scripts line by line, and equal parts of a document in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(content: dict[str, Any]) -> str:
    """Returns a document. The keys keep their order."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000))
