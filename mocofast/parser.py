"""Command-line parsers made from the options of configuration groups."""

from __future__ import annotations

import argparse
import copy
import functools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from mocofast import completion, settings
from mocofast.config import ConfigError, ModelConfig, method_options
from mocofast.plugins import is_plugin

WIDTH = 100  # columns of a help text


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations of options.

    A mistake ends the process with status 2 and one line that names the nearest known option.

    often: the options that --help shows. --help-all shows all. Empty: both show all.
    examples: command lines, for both.
    details: the end of what --help-all shows.
    """

    def __init__(
        self,
        *,
        often: Collection[str] = (),
        examples: Sequence[str] = (),
        details: Callable[[], str] = str,
        **kwargs: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **kwargs)
        self.often, self.examples, self.details = often, examples, details
        self.without_effect: set[str] = set()  # options of a group that the command does not use
        text = "show the options used most, and end" if often else "show this text, and end"
        self.add_argument("-h", "--help", action="help", help=text)
        text = "show all options, and end" if often else argparse.SUPPRESS
        self.add_argument(
            "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help=text
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses a command line. Ends the process if an argument is unknown."""
        completion.answer(self)
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if name.removeprefix("--") in self.without_effect:
                self.error(f"{name}: no effect on {self.prog}, which does not use the option")
            known = [option for action in self._actions for option in action.option_strings]
            what = "option" if name.startswith("-") else "argument"
            self.error(f"unknown {what} {name!r}{settings.nearest(name, known)}")
        return arguments

    def format_help(self) -> str:
        """Returns what --help shows."""
        if not self.often:
            return self.format_help_all()
        shown = [_briefly(a) for a in self._actions if self._is_often(a)]
        formatter = _Formatter(self.prog)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(formatter.wrapped(self.description))
        formatter.add_text(self._shown_examples())
        formatter.start_section("arguments, and the options used most")
        formatter.add_arguments(shown)
        formatter.end_section()
        titles = [str(group.title) for group in self._action_groups[2:]]  # after argparse's own
        names = ", ".join(title for title in titles if "," not in title)
        groups = f" ({names})" if names else ""
        more = f"{self.prog} --help-all: {len(self._actions) - len(shown)} more options{groups}"
        formatter.add_text(formatter.wrapped(more))
        return formatter.format_help()

    def format_help_all(self) -> str:
        """Returns what --help-all shows."""
        formatter = _Formatter(self.prog)
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(formatter.wrapped(self.description))
        formatter.add_text(self._shown_examples())
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(formatter.wrapped(self.details()))
        return formatter.format_help()

    def _is_often(self, action: argparse.Action) -> bool:
        names = action.option_strings
        return not names or any(name in self.often for name in names)

    def _shown_examples(self) -> str:
        return "\n  ".join(("examples:", *self.examples)) if self.examples else ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _briefly(action: argparse.Action) -> argparse.Action:
    """Returns an option of a group with the first clause of its help, its values and default."""
    if "." not in action.dest:
        return action
    brief, text = copy.copy(action), action.help or ""
    end = re.search(r"( \([^()]* \| [^()]*\))? \[[^\[]*\]$", text)
    brief.help = re.split(r"; | \(|, or the dotted| \[", text)[0] + (end[0] if end else "")
    return brief


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        super().__init__(prog, width=columns, **kwargs)

    def add_usage(
        self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None
    ) -> None:
        """Adds a usage, broken between its parts. Of no usage argparse makes one."""
        if usage is not None:
            parts = re.sub(r"[\[(][^\[(]*[\])]", lambda part: part[0].replace(" ", "\0"), usage)
            indent = " " * len(f"usage: {self._prog} ")
            lines = textwrap.wrap(
                f"usage: {parts}",
                self._width,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            usage, prefix = "\n".join(lines).replace("\0", " "), ""
        super().add_usage(usage, actions, groups, prefix)

    def wrapped(self, text: str | None) -> str:
        """Returns a text with its long lines broken. The second column of a table stays one."""
        lines = []
        for line in (text or "").splitlines():
            column = re.match(r" *(\S+ {2,})?", line)
            indent = " " * len(column[0]) if column else ""
            lines += textwrap.wrap(line, self._width, subsequent_indent=indent) or [""]
        return "\n".join(lines)


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        sys.stdout.write(parser.format_help_all())
        raise SystemExit


def add_settings(parser: Parser, groups: dict[str, type], without: Collection[str] = ()) -> None:
    """Adds the options of groups, {name: dataclass}.

    without: options, group.option, that the command does not use.
    """
    for group, kind in groups.items():
        title = (kind.__doc__ or "").splitlines()[0]
        members = [each for each in settings.settings(group, kind) if each.name not in without]
        _add_group(parser, group, title, members)
    parser.without_effect.update(without)


def _add_group(
    parser: argparse.ArgumentParser,
    name: str,
    title: str,
    members: Iterable[settings.Setting],
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Adds a group of options.

    name, title: heading of the group in the help, and a line about the group.
    members: the options.
    defaults: {option: text} where the help shows another text than the default value.
    """
    section = parser.add_argument_group(name, title)
    for setting in members:
        default = defaults.get(setting.name, settings.shown(setting.default))
        values = f" ({' | '.join(setting.choices)})" if setting.choices else ""
        action = section.add_argument(
            f"--{setting.name}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{setting.help}{values} [{default}]".replace("%", "%%"),
        )
        _offer_values(action, setting)


def _offer_values(action: argparse.Action, setting: settings.Setting) -> None:
    """Completes the values of an option that has a few."""
    values = ("true", "false") if setting.type is bool else setting.choices
    if values:
        completion.offer(action, values)


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Adds the options of a dataclass without a group, as flags: --shard-mb for shard_mb."""
    for setting in settings.settings("", kind):
        flag = f"--{setting.name.split('.')[1].replace('_', '-')}"
        text = settings.shown(setting.default)
        values = f" ({' | '.join(setting.choices)})" if setting.choices else ""
        shown = f"{setting.help}{values} [{text}]".replace("%", "%%")
        kind_of = functools.partial(_checked, setting)
        action = parser.add_argument(
            flag, type=kind_of, default=setting.default, metavar="VALUE", help=shown
        )
        _offer_values(action, setting)


def add_words(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the arguments RECIPE and IMAGES. text: for the help."""
    words = parser.add_argument("words", nargs="*", metavar="RECIPE|IMAGES", help=text)
    completion.offer(words, settings.recipes(), files=True)


def _checked(setting: settings.Setting, text: str) -> Any:
    """Returns the value of a flag. Raises ArgumentTypeError if the value is not valid."""
    try:
        value = settings.coerce(setting, text)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{setting.name}: ")
        raise argparse.ArgumentTypeError(reason) from error
    if setting.valid and not setting.valid.holds(value):
        raise argparse.ArgumentTypeError(f"expected {setting.valid.expected}, got {text!r}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the option --device of commands that do not train."""
    parser.add_argument(
        "--device", metavar="VALUE", default="auto", help="auto, cpu, cuda or cuda:N [auto]"
    )


def add_run_settings(parser: Parser, argv: Sequence[str]) -> None:
    """Adds all options of a pretraining run. argv: as for `add_method_settings`."""
    groups = settings.groups()
    add_settings(parser, {"model": ModelConfig})
    add_method_settings(parser, argv)
    add_settings(parser, {name: kind for name, kind in groups.items() if name != "model"})


def add_method_settings(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the options of all methods, grouped by the methods that have them.

    argv: the command line. If the method is a module of the user, the options of this module are
        added, too.
    """
    common = {setting.name for setting in settings.settings("model", ModelConfig)}
    options = {k: v for k, v in settings.model_options().items() if k not in common}
    groups: dict[str, list[settings.Setting]] = {}
    defaults = {}
    for name, owners in options.items():
        groups.setdefault(", ".join(owners), []).append(next(iter(owners.values())))
        defaults[name] = _defaults(owners)
    for methods, members in groups.items():
        _add_group(parser, f"model, method {methods}", "", members, defaults)
    method = _method_of(argv)
    if is_plugin(method):
        own = settings.settings("model", method_options(method))
        new = [setting for setting in own if setting.name not in {*common, *options}]
        _add_group(parser, f"model, method {method}", "", new)


def _method_of(argv: Sequence[str]) -> str:
    """Returns the method that a command line names, itself or by its YAML files, else ""."""
    words = [part for word in argv for part in word.split("=", 1)]
    for option, value in pairwise(words):
        if option == "--model.method":
            return value
    for option, value in zip(["", *words], words):
        if option == "--list":  # of sweep: the file is no recipe
            continue
        path = Path(value)
        if option in ("--resume", "--train.dir"):
            folder = path if path.is_dir() else path.parent.parent
            path = folder / "config.yaml"
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return settings.load_recipe(str(path)).model.method
    return ""


def _defaults(owners: Mapping[str, settings.Setting]) -> str:
    """Describes the defaults of an option: the common default, then methods with their own."""
    common, *_ = [settings.shown(setting.default) for setting in owners.values()]
    own: dict[str, list[str]] = {}
    for method, setting in owners.items():
        own.setdefault(settings.shown(setting.default), []).append(method)
    del own[common]
    exceptions = [f", with {', '.join(names)} [{value}" for value, names in own.items()]
    return "]".join([common, *exceptions])


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the options of groups that the command line gives, {"group.option": text}."""
    return {name: value for name, value in vars(arguments).items() if "." in name}


def group_options(kind: type, group: str, arguments: argparse.Namespace) -> Any:
    """Returns the group's dataclass with the values of the command line."""
    options, given = kind(), given_settings(arguments)
    for setting in settings.settings(group, kind):
        if setting.name in given:
            setattr(
                options, setting.name.split(".")[1], settings.coerce(setting, given[setting.name])
            )
    return options
