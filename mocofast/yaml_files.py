"""Reads YAML files of options. A file from anywhere costs little, and errors name the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mocofast.errors import ConfigError

LARGEST = 2**18  # bytes of a file. A file with every option has 6 kB.
DEEPEST = 8  # levels of lists and mappings
LONGEST = 4096  # characters of a value


def read(content: bytes, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns {group: {option: value}}, and the lines of options and groups, counted from 1.

    name: of the file, for messages. Lines are {"group.option": line, "group": line}.
    Raises ConfigError, naming the line, for content that is no YAML of mappings in UTF-8, has an
    option twice, has references (`*name`), is too large or too deep, or names a type of Python.
    """
    import yaml  # here, so that `mocofast --help` does without it

    if len(content) > LARGEST:
        raise ConfigError(f"{name}: expected at most {LARGEST:,} bytes, got {len(content):,}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{name}, line {line}: expected text in UTF-8, got the byte {content[error.start]:#x}"
        ) from None
    kind: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_size(yaml.parse(text, kind), name)
        loader = kind(text)
        try:
            return _options(loader, loader.get_single_node(), name)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}, line {line}: not a YAML file: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not a YAML file: {error}") from None


def at_line(error: ConfigError, name: str, lines: Mapping[str, int]) -> ConfigError:
    """Returns the error of an option with the file and the line of the option."""
    text = str(error)
    for known in sorted(lines, key=len, reverse=True):
        if text.startswith(f"{known}:") or f"'{known}'" in text.split(";")[0]:
            return ConfigError(f"{name}, line {lines[known]}: {text}")
    return ConfigError(f"{name}: {text}")


def _check_size(events: Iterator[Any], name: str) -> None:
    """Raises ConfigError before anything is built that is deep, long, or refers to other parts."""
    import yaml

    depth = 0
    for event in events:
        where = f"{name}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: expected a value, got the reference *{event.anchor}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
            length = len(event.value)
            raise ConfigError(f"{where}: a value of {length} characters; at most {LONGEST}")
        if depth > DEEPEST:
            raise ConfigError(f"{where}: more than {DEEPEST} levels of lists and groups")


def _options(loader: Any, root: Any, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if root is None:
        return values, lines
    for group, node, line in _entries(loader, root, name, "groups of options"):
        lines[group] = line
        if group == "recipe":
            values[group] = _built(loader, node, name)
            continue
        values[group] = {}
        for option, value, line in _entries(loader, node, name, "options"):
            lines[f"{group}.{option}"] = line
            values[group][option] = _built(loader, value, name)
    return values, lines


def _entries(loader: Any, node: Any, name: str, what: str) -> Iterator[tuple[str, Any, int]]:
    """Yields key, node of the value, and line of a mapping's entries."""
    import yaml

    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r:.60}"
        raise ConfigError(f"{name}, line {line}: expected {what}, got {found}")
    seen = set()
    for key, value in node.value:
        line, text = key.start_mark.line + 1, str(_built(loader, key, name))
        if text in seen:
            raise ConfigError(f"{name}, line {line}: {text} stands here a second time")
        seen.add(text)
        yield text, value, line


def _built(loader: Any, node: Any, name: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date without such a day, a huge number
        raise ConfigError(f"{name}, line {node.start_mark.line + 1}: {error}") from None
