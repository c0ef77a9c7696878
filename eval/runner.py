"""Runs the jobs of one table, in several processes, and keeps a record of each as it ends.

A table is a file of variants and a bench: an object, or a module, with

    device                   what it computes on, "cpu" or "cuda"
    settings(job) -> dict    all that decides the job's record
    run(job) -> dict         trains and judges: "average", by which variants are compared, and what else the record says

and, where jobs share work, with methods that its steps call (`Step`). A job that has a record is skipped; one whose
record is of other settings is refused, so that results that do not belong together never share a table.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from eval.records import Job, Refused, append, digest, read


@dataclass(frozen=True)
class Step:
    """A call of the bench: its method, the arguments, and the names of the steps that come before it. `Step.of(job)` is
    the one that ends in a record."""

    call: str
    arguments: tuple = ()
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job, *needs: str) -> Step:
        return cls("run", (job,), needs)

    @property
    def job(self) -> Job | None:
        return self.arguments[0] if self.call == "run" else None

    @property
    def name(self) -> str:
        return " ".join([self.call, *(str(getattr(each, "name", each)) for each in self.arguments)])


def missing(jobs: Iterable[Job], bench: Any, path: Path) -> list[Job]:
    """The jobs that have no record in the file. Raises Refused where one has a record of other settings."""
    records = {Job.of(record): record for record in read(path)}
    left = []
    for job in jobs:
        if job not in records:
            left.append(job)
            continue
        kept, wanted = records[job].get("settings"), digest(bench.settings(job))
        if kept != wanted:
            raise Refused(
                f"{path}: the record of {job.name} was made under settings {kept} and these are {wanted}: take its "
                "line out, move the file away, or give another folder (--out)"
            )
    return left


def complete(
    steps: Sequence[Step],
    path: Path,
    pool: Executor,
    *,
    workers: int = 1,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Step]:
    """Takes the steps in their order as far as what they need is there, `workers` at a time, and appends a job's record
    to the file as it ends; returns the steps that are left.

    minutes: a step is begun only where the longest of its kind so far would still end in time. Where a step fails, no
    other is begun, those that run come to their end and are kept, and its error is raised.
    """
    waiting, running, done = list(steps), {}, set()
    begun, longest, error = time.monotonic(), {}, None

    def fits(step: Step) -> bool:
        return minutes is None or time.monotonic() - begun + longest.get(step.call, 0.0) < 60 * minutes

    while True:
        for step in list(waiting):
            if error is None and len(running) < workers and done.issuperset(step.needs) and fits(step):
                waiting.remove(step)
                started = time.monotonic()
                running[pool.submit(_do, step)] = (step, started)
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            step, started = running.pop(future)
            if future.exception() is not None:
                error = error or future.exception()
                continue
            seconds = time.monotonic() - started
            longest[step.call] = max(longest.get(step.call, 0.0), seconds)
            done.add(step.name)
            if step.job is not None:
                kept = append(path, future.result())
                says = f"{future.result()['average']:.1f}" if kept else "another process was first, its record stays"
                say(f"{step.name}: {says}, {seconds:.0f} s ({len(waiting) + len(running)} steps left)")
    if error is not None:
        raise error
    return waiting


# ---- Processes


@contextmanager
def opened(bench: Callable[[], Any], workers: int, threads: int | None = None) -> Iterator[Executor]:
    """A pool whose processes open a bench each by calling `bench`, which must be picklable; one worker is this process.
    threads: of torch, in each process."""
    if workers == 1:
        _open(bench, None)
        yield _Here()
        return
    spawn = get_context("spawn")  # a forked process cannot use a GPU that its parent has seen
    with ProcessPoolExecutor(workers, spawn, initializer=_open, initargs=(bench, threads)) as pool:
        yield pool


class _Here(Executor):
    """One step at a time, in this process."""

    def submit(self, call, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


_bench: Any = None


def _open(bench: Callable[[], Any], threads: int | None) -> None:
    global _bench
    if threads:
        torch.set_num_threads(threads)
    commit()  # now, and not when the first job ends: that is the code that runs
    _bench = bench()


def _do(step: Step) -> dict | None:
    """Calls the bench of this process; a job gives its record."""
    started = time.monotonic()
    result = getattr(_bench, step.call)(*step.arguments)
    if step.job is None:
        return None
    return {
        **asdict(step.job),
        "seconds": time.monotonic() - started,
        **result,
        "settings": digest(_bench.settings(step.job)),
        "commit": commit(),
        "machine": machine(_bench.device),
    }


@functools.lru_cache
def commit() -> str:
    """Of the working tree, with "+" where its Python files have changes; "unknown" outside a repository."""
    root = Path(__file__).parents[1]
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "*.py"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def machine(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


# ---- The command line that tables share


def add_flags(parser: argparse.ArgumentParser, pieces: Iterable[str], seeds: Sequence[int], out: Path) -> None:
    """--pieces, --table, --minutes, --seeds, --workers, --out."""
    parser.add_argument("--pieces", help=f"some of {', '.join(pieces)}, with commas; left out, all of the size's")
    parser.add_argument("--table", action="store_true", help="no runs, the table and the plots alone")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    most, listed = len(seeds), ", ".join(map(str, seeds))
    parser.add_argument("--seeds", type=int, default=most, choices=range(1, most + 1), help=f"how many of {listed}")
    parser.add_argument("--workers", type=int, help="runs at a time, each in a process; 2 on a CPU, 4 on a GPU")
    parser.add_argument("--out", type=Path, default=out, help="folder of the results, the table and the plots")


def variants_of(pieces: Mapping[str, Sequence], names: Sequence[str]) -> list:
    """The variants of the pieces of those names, each once. Raises Refused for an unknown piece."""
    unknown = [name for name in names if name not in pieces]
    if unknown:
        raise Refused(f"unknown pieces {unknown}; known are {', '.join(pieces)}")
    return list(dict.fromkeys(variant for name in names for variant in pieces[name]))
