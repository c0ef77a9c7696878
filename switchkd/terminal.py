"""Text of data and models on a terminal, which takes some characters for orders."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with its control characters (escape sequences, carriage returns, tabs; not line breaks) as \\x.. codes."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text
    )
