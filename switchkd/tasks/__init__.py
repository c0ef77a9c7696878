"""Tasks: what a run makes. A task is a module of plain functions; its configuration stands beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from switchkd import config
from switchkd.tasks.vlm_config import Run


def load_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> Run:
    """The configuration that command line arguments name (`sys.argv[1:]` by default), as `switchkd.config.load`."""
    return config.load(Run, sys.argv[1:] if argv is None else argv, prog=prog)
