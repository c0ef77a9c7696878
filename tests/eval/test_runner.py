"""The runner with benches that know no model."""

import functools
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import runner
from eval.records import Job, Refused, read
from eval.runner import Step, complete, missing, opened, variants_of

JOBS = [Job(variant, "", seed, "") for variant in ("a", "b") for seed in (0, 1)]


class Bench:
    """Adds up; every call leaves a line in the log."""

    device = "cpu"

    def __init__(self, log: Path, lr: float = 0.1, fails: str = ""):
        self.log, self.lr, self.fails = log, lr, fails

    def settings(self, job):
        return {"lr": self.lr, "variant": job.variant, "seed": job.seed}

    def prepare(self, variant):
        self._note(f"prepare {variant}")

    def run(self, job):
        self._note(f"run {job.name}")
        if job.name == self.fails:
            raise RuntimeError(f"{job.name} broke")
        return {"average": 10.0 + job.seed}

    def _note(self, line):
        with self.log.open("a") as file:
            file.write(line + "\n")


def steps_of(jobs):
    return [Step("prepare", ("a",)), *(Step.of(job, "prepare a") for job in jobs)]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_runs_once_and_leaves_a_record(tmp_path, workers):
    path, log = tmp_path / "x.jsonl", tmp_path / "log"
    bench, said = functools.partial(Bench, log), []
    with opened(bench, workers, threads=1) as pool:
        todo = missing(JOBS, bench(), path)
        assert todo == JOBS
        assert complete(steps_of(todo), path, pool, workers=workers, say=said.append) == []
    assert missing(JOBS, bench(), path) == []
    lines = log.read_text().splitlines()
    assert lines[0] == "prepare a"
    assert sorted(lines[1:]) == sorted(f"run {job.name}" for job in JOBS)
    records = read(path)
    assert {Job.of(record) for record in records} == set(JOBS)
    for record in records:
        assert record["average"] == 10.0 + record["seed"]
        assert record["seconds"] >= 0
        assert {"settings", "commit", "machine"} <= record.keys()
    assert len(said) == 4
    assert any(line.startswith("run b-1: 11.0, 0 s") for line in said)


def test_what_is_done_is_skipped_and_other_settings_are_refused(tmp_path):
    path, log = tmp_path / "x.jsonl", tmp_path / "log"
    with opened(functools.partial(Bench, log), 1) as pool:
        complete([Step.of(job) for job in JOBS[:2]], path, pool)
        assert missing(JOBS, Bench(log), path) == JOBS[2:]
        with pytest.raises(Refused, match=r"x\.jsonl: the record of a-0 was made under settings \w+ and these are"):
            missing(JOBS, Bench(log, lr=0.2), path)
        assert missing(JOBS[2:], Bench(log, lr=0.2), path) == JOBS[2:]  # of a job that is not asked for


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_keeps_what_the_others_gave_and_begins_no_more(tmp_path, workers):
    path, log = tmp_path / "x.jsonl", tmp_path / "log"
    many = [Job("a", "", seed, "") for seed in range(30)]
    fails = functools.partial(Bench, log, fails="a-3")
    with pytest.raises(RuntimeError, match="a-3 broke"), opened(fails, workers) as pool:
        complete([Step.of(job) for job in many], path, pool, workers=workers, say=lambda line: None)
    ran = [line for line in log.read_text().splitlines() if line != "run a-3"]
    assert sorted(line.removeprefix("run ") for line in ran) == sorted(Job.of(each).name for each in read(path))
    assert {f"run a-{seed}" for seed in range(3)} <= set(ran)
    assert len(ran) < 10


def test_a_step_whose_needs_are_not_there_is_left():
    with opened(functools.partial(Bench, Path("/dev/null")), 1) as pool:
        steps = [Step.of(JOBS[0], "prepare a"), Step("prepare", ("b",))]
        assert complete(steps, Path("/dev/null"), pool) == steps[:1]


def test_no_step_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Bench, "run", lambda self, job: now.__setitem__(0, now[0] + 50) or {"average": 1.0})
    with opened(functools.partial(Bench, tmp_path / "log"), 1) as pool:
        left = complete([Step.of(job) for job in JOBS], tmp_path / "x.jsonl", pool, minutes=2)
    assert [step.job for step in left] == JOBS[2:]  # 50 s each: the third would end after 150
    assert len(read(tmp_path / "x.jsonl")) == 2


def test_a_record_that_another_process_wrote_first_stays(tmp_path):
    path, said = tmp_path / "x.jsonl", []
    with opened(functools.partial(Bench, tmp_path / "log"), 1) as pool:
        complete([Step.of(JOBS[0])], path, pool)
        before = path.read_text()
        complete([Step.of(JOBS[0])], path, pool, say=said.append)
    assert path.read_text() == before
    assert "another process was first" in said[0]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """The first process dies while it writes its third record."""
    (tmp_path / "table.py").write_text(
        "import os\n"
        "device = 'cpu'\n"
        "def settings(job): return {'variant': job.variant}\n"
        "def run(job):\n"
        "    if job.seed == 2 and not os.path.exists('second'):\n"
        "        open('x.jsonl', 'a').write('{\"variant\": \"a\", \"sta')\n"
        "        os._exit(9)\n"
        "    return {'average': 1.0 * job.seed}\n"
    )
    code = (
        "import functools, importlib, sys; from pathlib import Path\n"
        "from eval.runner import Job, Step, complete, missing, opened\n"
        "bench = functools.partial(importlib.import_module, 'table')  # a module is a bench as well\n"
        "jobs = [Job('a', '', seed, '') for seed in range(5)]\n"
        "todo = missing(jobs, bench(), Path('x.jsonl')); print(len(todo))\n"
        "with opened(bench, 1) as pool: complete([Step.of(job) for job in todo], Path('x.jsonl'), pool)"
    )
    command = [sys.executable, "-c", code]
    # eval is not installed.
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}}
    killed = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    (tmp_path / "second").touch()
    again = subprocess.run(command, **where, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[0] == "3"
    assert [record["seed"] for record in read(tmp_path / "x.jsonl")] == [0, 1, 2, 3, 4]


def test_the_commit_says_where_any_python_file_has_changes(tmp_path, monkeypatch):
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "eval").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("eval/runner.py", "other/model.py"):
        (tmp_path / name).write_text("x = 1\n")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "-qm", "first"], cwd=tmp_path, check=True)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "eval/runner.py"))
    asked = runner.commit.__wrapped__
    assert not asked().endswith("+")
    (tmp_path / "other/model.py").write_text("x = 2\n")
    assert asked().endswith("+")


def test_pieces_give_each_variant_once_and_unknown_ones_are_refused():
    pieces = {"one": ("x", "y"), "two": ("y", "z")}
    assert variants_of(pieces, ["two", "one"]) == ["y", "z", "x"]
    with pytest.raises(Refused, match=r"unknown pieces \['on'\]; known are one, two"):
        variants_of(pieces, ["on", "two"])


def test_the_runner_knows_no_model_and_no_skill():
    code = (
        "import sys, eval.runner; found = [name for name in sys.modules if name.partition('.')[0] in "
        "('switchkd', 'transformers') or name.startswith('eval.ten_skills')]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.import_module("eval.records")
