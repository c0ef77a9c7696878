"""What every run's configuration has: how it is read, kept and compared.

A task's configuration (`switchkd.tasks`) is a dataclass of sections, each the dataclass of its owner. The text under a
field is its help text. A YAML file has the same nesting, `--train.lr 1e-3` on the command line wins over it, and a key
that is not a field is an error. Nothing here, nor in a section's module, imports torch: help and refusals are quick.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from switchkd.config_file import absolute, dataclass_in, from_file, read_yaml, with_paths, write_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Run = TypeVar("Run")
Section = TypeVar("Section")


@dataclass(frozen=True)
class Stage:
    """One stage of a run as it is trained: what its own section and the run's say together.

    name: teacher, pretrain, sft, distil, or undistilled, the control of distil without the teacher; the same word in
    the configuration, the run's folder, its log, tables and messages. start: the stage whose student it starts from;
    None: the model that the configuration names. folder: of its stock checkpoint in the run's; "student" for what
    the run is made for. data, train, freeze, method: of the section's owner; method None: no teacher. own: those of
    them that stand under `section` in the configuration; the others are the run's.
    """

    name: str
    start: str | None
    folder: str
    data: Any
    train: Any
    freeze: tuple[str, ...] = ()
    method: Any = None
    own: frozenset[str] = frozenset()
    section: str = ""

    def field(self, name: str) -> str:
        """Where "data", "train", "method" or "freeze" of this stage stands in the configuration."""
        return f"{self.section or self.name}.{name}" if name in self.own else name


def load(run: type[Run], argv: Sequence[str], *, prog: str | None = None) -> Run:
    """The configuration of class `run` that command line arguments name.

    `--config FILE.yaml` reads a file, whose paths are relative to it; `--section.field value` sets one field; the later
    one wins. `--help` lists the fields; a bare `--tiny` or `--resume` is true. What is wrong (an unknown key, another
    type, a missing file) is one line on stderr, exit status 2.
    """
    from jsonargparse import ArgumentError

    parser = _parser(prog)
    parser.add_argument("--config", action="config", help="A YAML file of the fields below.")
    parser.add_class_arguments(run)
    try:
        return _parsed(parser, run, _with_bare_flags(argv))
    except (ArgumentError, ValueError, OSError) as error:
        text = _with_nearest(" ".join(str(error).split()), run)
        print(f"{parser.prog}: error: {text} (--help lists the fields)", file=sys.stderr)
        raise SystemExit(2) from None


def _parser(prog: str | None = None) -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=prog, exit_on_error=False)


def _parsed(parser: ArgumentParser, run: type[Run], argv: list[str]) -> Run:
    from jsonargparse import Namespace

    values = parser.parse_args(_with_files(argv, run))
    del values["config"]
    for section in fields(run):
        if is_dataclass(section.default_factory) and not isinstance(values[section.name], Namespace):
            # A group that may be left out is null, or a group.
            if values[section.name] is None and "None" in str(section.type):
                continue
            raise ValueError(f"{section.name} is {values[section.name]}, it must be a group of fields")
    return run(**vars(parser.instantiate(values)))


def _with_files(argv: list[str], run: type[Run]) -> list[str]:
    """Each `--config FILE` as what the file holds, its paths made relative to the working folder."""
    given, words = [], iter(argv)
    for word in words:
        option, equals, file = word.partition("=")
        if option != "--config":
            given.append(word)
            continue
        file = Path(file if equals else next(words, ""))
        given += ["--config", json.dumps(with_paths(read_yaml(file), run, from_file(file)))]
    return given


def _with_nearest(text: str, run: type[Run]) -> str:
    """An error about an unknown field, with the nearest one that exists."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|'(?:([\w.]+)' does not accept option ')?(\w+)'", text)
    if not unknown or not ("unrecognized" in text or "accept" in text):
        return text
    argument, section, name = unknown.groups()
    wanted = argument or (f"{section}.{name}" if section else name)
    known = _names(run)
    near = difflib.get_close_matches(wanted, known, n=1) or [k for k in known if k.endswith(f".{wanted}")][:1]
    return f"{text}: the nearest field is {near[0]}" if near else text


def _names(kind: Any, prefix: str = "") -> list[str]:
    hints, names = get_type_hints(kind), []
    for each in fields(kind):
        names.append(prefix + each.name)
        inner = dataclass_in(hints[each.name])
        if inner is not None and get_origin(hints[each.name]) is not tuple:
            names += _names(inner, f"{prefix}{each.name}.")
    return names


def read_section(path: str | os.PathLike, name: str, section: type[Section]) -> Section:
    """Section `name` of a configuration file, whatever else the file holds; its defaults where it is left out.

    Raises FileNotFoundError for a missing file, ValueError naming the file for what `section` does not take.
    """
    from jsonargparse import ArgumentError

    values = with_paths(read_yaml(path).get(name) or {}, section, from_file(Path(path)))
    parser = _parser()
    parser.add_class_arguments(section, name)
    try:
        return getattr(parser.instantiate(parser.parse_object({name: values})), name)
    except ArgumentError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _with_bare_flags(argv: Sequence[str]) -> list[str]:
    """`--tiny` and `--resume` without a value are given "true"."""
    whole = []
    for here, after in itertools.zip_longest(argv, argv[1:]):
        bare = here in ("--tiny", "--resume") and (after is None or after.startswith("--"))
        whole += [here, "true"] if bare else [here]
    return whole


def save_config(config: Any, path: str | os.PathLike, **instead: Any) -> None:
    """Write `config` as the YAML file that `load` reads back to an equal one, whatever the working folder; fields of
    `instead` stand there as they are."""
    write_yaml({**with_paths(_plain(asdict(config)), type(config), absolute), **instead}, path)


def weight_fields(config: Any) -> dict[str, Any]:
    """The fields that decide a run's weights, by dotted name: all but names, places, judging and what is kept."""
    free = (".root", ".made_by", "data.in_memory", "train.data_workers", "train.keep_checkpoints")
    free += ("train.logging_steps", "train.checkpoint_every", "train.report_to")
    free_sections = ("name", "out", "resume", "threads", "tiny", "undistilled", "judge")
    flat: dict[str, Any] = {}
    plain = with_paths(_plain(asdict(config)), type(config), absolute)  # one path, however it was written
    for section in fields(config):
        if section.name not in free_sections:
            flat |= _flat(section.name, plain[section.name])
    return {name: item for name, item in flat.items() if not name.endswith(free)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (_flat(f"{name}.{key}", each) for key, each in value.items())
    return {key: item for part in parts for key, item in part.items()}


def filled_in(path: str, field: str) -> Path:
    """`path` with its $VARIABLES; ValueError naming `field` where one of them is not set."""
    whole = os.path.expanduser(os.path.expandvars(path))
    if "$" in whole:
        raise ValueError(f"{field} is {path} and that variable is not set: set it, or give --{field}")
    return Path(whole)


def at_least(section: str, config: Any, **least: float) -> None:
    """ValueError where a field of `config`, section `section` of a run, is below its least value; None passes."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{section}.{name} is {value}, it must be {smallest} or more")


def refuse_unread(section: str, config: Any, names: Sequence[str], why: str) -> None:
    """ValueError for the first of the fields `names` that is not at its default, because nothing reads it: `why` names
    the field that says so, its value and the way out."""
    for each in fields(config):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = getattr(config, each.name)
        if each.name in names and value != default:
            raise ValueError(f"{section}.{each.name} is {value} but {why}, or leave {each.name} out")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
