"""Divergences by name: the ones that the package has, and a user's own as "package.module:function".

No torch here: a name is judged before it is imported (`check_divergence`) where a configuration is read.
"""

from __future__ import annotations

import difflib
import importlib
import operator
from collections.abc import Callable, Iterable

DIVERGENCES: dict[str, str] = {
    "dbild": "switchkd.losses.dbild:dbild_loss",
    "bild": "switchkd.losses.dbild:bild_loss",
    "forward_kl": "switchkd.losses.divergences:forward_kl",
    "reverse_kl": "switchkd.losses.divergences:reverse_kl",
    "jsd": "switchkd.losses.divergences:jsd",
}


def check_divergence(name: str) -> None:
    """ValueError unless `name` is one of DIVERGENCES or has the form "package.module:function"; imports nothing."""
    if name in DIVERGENCES:
        return
    module, colon, function = name.partition(":")
    if colon and all(part.isidentifier() for each in (module, function) for part in each.split(".")):
        return
    raise ValueError(
        f"unknown divergence {name!r}{_nearest(name, DIVERGENCES)}: give one of {', '.join(DIVERGENCES)}, or your own "
        "function as package.module:function"
    )


def divergence(name: str) -> Callable:
    """The function of that name, [N, V] (student's logits), [N, V] (teacher's) -> [N].

    Raises ValueError for an unknown name, and where the module, its attribute or a function is missing. Whatever else
    goes wrong while a user's module is imported comes out as it is.
    """
    check_divergence(name)
    path, _, attribute = DIVERGENCES.get(name, name).partition(":")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path and not path.startswith(f"{error.name}."):
            raise ValueError(f"divergence {name!r}: module {path} cannot be imported, {error}: install that") from error
        raise ValueError(
            f"divergence {name!r}: there is no module {error.name}: put the folder that holds it on PYTHONPATH"
        ) from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(
            f"divergence {name!r}: {module.__file__} has no {attribute}{_nearest(attribute, vars(module))}"
        ) from error
    if not callable(function):
        raise ValueError(
            f"divergence {name!r}: {attribute} in {module.__file__} is a {type(function).__name__} and cannot be "
            "called: give a function [N, V], [N, V] -> [N]"
        )
    return function


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]}?)" if found else ""
