"""Tasks: what a run makes. A task is a module of plain functions; its configuration stands beside it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from switchkd import config
from switchkd.config_file import read_yaml
from switchkd.tasks.vlm_config import Run


def load_config(
    argv: Sequence[str] | None = None, *, prog: str | None = None, default: str | Path | None = None
) -> Run:
    """The configuration that command line arguments name (`sys.argv[1:]` by default), as `switchkd.config.load`.

    default: the file that is read where no --config is given. Where --resume names a run, that run's own is read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = [] if default is None else ["--config", str(default)]
    if any(word.partition("=")[0] == "--config" for word in argv):
        given = []
    elif any(word.partition("=")[0] == "--resume" for word in argv):
        # Of which run, is all that is asked here: the other fields are set on its own configuration.
        named = config.load(Run, [*given, *_only(argv, "--name", "--out", "--resume")], prog=prog)
        own = named.folder / "config.yaml"
        if named.resume and own.is_file():
            given = ["--config", str(own)]
    run = config.load(Run, [*given, *argv], prog=prog)
    teacher = run.teacher
    if teacher.made_by:
        made = Path(run.out) / str(read_yaml(teacher.made_by, "teacher.made_by").get("name")) / "student"
        if not teacher.path:
            run = replace(run, teacher=replace(teacher, path=str(made)))
        elif os.path.abspath(teacher.path) != os.path.abspath(made):  # another teacher, which that run does not make
            run = replace(run, teacher=replace(teacher, made_by=None))
    return run


def task_of(run: Run) -> ModuleType:
    """The module of plain functions that knows the models and the data of `run`; importing it imports torch."""
    return importlib.import_module(f"switchkd.tasks.{run.task}")


def _only(argv: list[str], *options: str) -> list[str]:
    """Those options of `argv`, each with its value."""
    kept: list[str] = []
    takes = False
    for word in argv:
        if word.startswith("--"):
            takes = word.partition("=")[0] in options
        if takes:
            kept.append(word)
    return kept
