"""Class names that are one name in two forms: two people who labelled, two tools, two data sets of a mixture."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def refuse_alike(classes: Iterable[tuple[str, str]]) -> None:
    """ValueError where two of the classes, each with where it stands, are one name in two forms: they differ only in
    case, in `_`, `-` or spaces, or in Unicode form. As two classes, each would be denied where the other one is."""
    seen: dict[str, tuple[str, str]] = {}
    for name, where in classes:
        first, first_where = seen.setdefault(_form(name), (name, where))
        if name != first:
            of = "" if where == first_where else f" of {first_where}"
            raise ValueError(
                f"{where}: class {name!r} differs from {first!r}{of} only in its form (case, '_', '-', spaces, Unicode"
                " form), and would be taken for another one: write both alike"
            )


def _form(name: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return re.sub(r"[\s_-]+", " ", folded).strip()
