"""The results of one table: a JSON-lines file with a record a job, and means and spreads over seeds from it."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import CodeType, FunctionType


class Refused(ValueError):
    """Results or a choice that cannot be gone on with; the message is one line and says the way out."""


@dataclass(frozen=True)
class Job:
    """What one record is of. start: what the model begins from; split: what it is judged on; "" where a table knows one
    alone."""

    variant: str
    start: str
    seed: int
    split: str

    @classmethod
    def of(cls, record: dict) -> Job:
        return cls(*(record[name] for name in ("variant", "start", "seed", "split")))

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in (self.split, self.variant, self.start, self.seed) if value != "")


# ---- The file


def read(path: Path) -> list[dict]:
    """The records in their order, none where there is no file. The torn last line of a process that was killed while it
    wrote is left out. Raises Refused for any other line that is no record, and for a job that has two."""
    return _read(path, path.read_bytes())[0] if path.exists() else []


def append(path: Path, record: dict) -> bool:
    """Adds a line, whole or torn as the last; a torn line before it is taken away. False, and nothing is written, where
    the job has a record already. Several processes may append to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        text = file.read()
        records, whole = _read(path, text)
        if Job.of(record) in map(Job.of, records):
            return False
        file.truncate(whole)
        end = b"" if text[:whole].endswith(b"\n") or not whole else b"\n"
        file.write(end + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _read(path: Path, text: bytes) -> tuple[list[dict], int]:
    """The records, and the bytes before a torn last line."""
    records, lines, whole = {}, text.splitlines(keepends=True), len(text)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            job = Job.of(record)
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith(b"\n"):
                whole -= len(line)
                continue
            raise Refused(
                f"{path}, line {number}, is no record (JSON with variant, start, seed and split): take it out"
            ) from None
        if job in records:
            raise Refused(f"{path}, line {number}, is a second record of {job.name}: take one of the two out")
        records[job] = record
    return list(records.values()), whole


# ---- What decides a result


def digest(settings: dict) -> str:
    """Of settings that JSON can hold, and of functions, which stand as `named` writes them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=named).encode()).hexdigest()[:10]


def named(function: Callable) -> str:
    """ "module:function#hash": the hash is of its source and of what it names in its own module, functions, classes and
    values. Raises ValueError for what has no name in a module (a lambda, a partial, a function within another), since
    a change of it would not show.
    """
    name = getattr(function, "__qualname__", "<no name>")
    if "<" in name or not inspect.isfunction(function):
        raise ValueError(
            f"{function!r} stands in a variant: give a function that its module holds by name, so that a table knows it"
        )
    sources: dict[str, str] = {}
    _collect(inspect.unwrap(function), sources)
    text = json.dumps(sources, sort_keys=True)
    return f"{function.__module__}:{name}#{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _collect(function: FunctionType, sources: dict[str, str]) -> None:
    """Adds the source of a function and of what it names in its module to `sources`, by name."""
    sources[function.__qualname__] = inspect.getsource(function)
    held = function.__globals__
    for name in _names(function.__code__) & held.keys() - sources.keys():
        value = held[name]
        if getattr(value, "__module__", None) == function.__module__:
            if inspect.isfunction(value):
                _collect(inspect.unwrap(value), sources)
            elif inspect.isclass(value):
                sources[name] = inspect.getsource(value)
        elif isinstance(value, (bool, int, float, str, tuple, list, dict)):
            sources[name] = repr(value)


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


# ---- Means and spreads


@dataclass(frozen=True)
class Results:
    """The records of one table."""

    records: tuple[dict, ...]

    @classmethod
    def of(cls, path: Path) -> Results:
        return cls(tuple(read(path)))

    def rows(self, variant: str, start: str, split: str, seeds: Iterable[int]) -> list[dict]:
        """A variant's records, in the order of the seeds."""
        wanted = {Job(variant, start, seed, split) for seed in seeds}
        return sorted((each for each in self.records if Job.of(each) in wanted), key=lambda record: record["seed"])

    def whole(self, names: Iterable[str], start: str, split: str, seeds: Sequence[int]) -> list[str]:
        """Those variants that have all seeds: a choice is made among these."""
        return [name for name in names if len(self.rows(name, start, split, seeds)) == len(seeds)]

    def best(self, names: Iterable[str], start: str, split: str, seeds: Sequence[int]) -> str | None:
        """The variant with the highest mean average, of those that have all seeds."""
        means = {
            name: mean(row["average"] for row in self.rows(name, start, split, seeds))
            for name in self.whole(names, start, split, seeds)
        }
        return max(means, key=means.get) if means else None


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, "53.4 ± 0.6"; without values a dash."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def made(records: Sequence[dict]) -> str:
    """ "Made on MACHINES at COMMITS, N minutes of training and judging in all." of those records alone."""
    machines = " / ".join(sorted({record["machine"] for record in records}))
    commits = ", ".join(sorted({record["commit"] for record in records}))
    minutes = sum(record["seconds"] for record in records) / 60
    return f"Made on {machines} at {commits}, {minutes:.0f} minutes of training and judging in all."


def markdown(head: Sequence, lines: Sequence[Sequence]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
