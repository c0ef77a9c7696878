"""Configuration files: YAML that reads back as it was written, and whose paths are relative to their file.

PyYAML writes and reads by YAML 1.1, in which `1e-4` is a text; people write it for a number. Here both directions
follow one rule: what looks like a number to either is a number, and a text of that look is written in quotes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")
FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice in one mapping: the second would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice: keep one of them", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


for _rules in (_Loader, _Dumper):
    _rules.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


def read_yaml(path: str | os.PathLike, field: str = "--config") -> dict[str, Any]:
    """The mapping that the file holds; `field` says what names it.

    Raises FileNotFoundError for a missing file, ValueError naming the file where it is no YAML, holds no mapping, or
    gives a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{field} is {path}, which is not a file: `switchkd configs` lists the shipped ones")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file that can be read: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: a configuration is a mapping of fields")
    return values


def write_yaml(values: Mapping[str, Any], path: str | os.PathLike) -> None:
    """`values`, of plain types, so that `read_yaml` gives them back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def with_paths(values: Any, kind: Any, change: Callable[[str, str], str]) -> Any:
    """`values` of a dataclass `kind`, as plain mappings, with `change(path, rule)` of every path in them.

    A field whose metadata has "path" holds one: "always", or "where it is there" for what may also be a Hub name or the
    name of a split. Values of other types than the field's are left for the parser to refuse.
    """
    kind = dataclass_in(kind)
    if kind is None or not isinstance(values, Mapping):
        return values
    hints = get_type_hints(kind)
    changed = dict(values)
    for each in fields(kind):
        value = changed.get(each.name)
        if value is None:
            continue
        if rule := each.metadata.get("path"):
            changed[each.name] = change(value, rule) if isinstance(value, str) else value
        elif isinstance(value, list | tuple):
            changed[each.name] = [with_paths(item, hints[each.name], change) for item in value]
        else:
            changed[each.name] = with_paths(value, hints[each.name], change)
    return changed


def from_file(file: Path) -> Callable[[str, str], str]:
    """Paths relative to `file` -> relative to the working folder where they lie below it, else absolute."""

    def change(path: str, rule: str) -> str:
        path = os.path.expanduser(path)
        if path.startswith("$") or os.path.isabs(path):
            return path
        there = os.path.normpath(os.path.join(os.path.abspath(file.parent), path))
        explicit = path.split("/")[0] in (".", "..")
        if rule != "always" and not explicit and not os.path.exists(there):
            return path
        return _from_here(there)

    return change


def absolute(path: str, rule: str) -> str:
    """The path wherever it is read from; what is no path on this disk (a Hub name) and $VARIABLES stay."""
    path = os.path.expanduser(path)
    if path.startswith("$") or (rule != "always" and not os.path.exists(path)):
        return path
    return os.path.abspath(path)


def _from_here(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def dataclass_in(kind: Any) -> Any:
    """The dataclass in a type such as `Section | None` or `tuple[Section, ...]`; None where there is none."""
    if is_dataclass(kind):
        return kind
    return next((each for each in get_args(kind) if is_dataclass(each)), None)
