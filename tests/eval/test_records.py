"""The file of a table's results, and what stands for a function in its settings."""

import functools
import importlib
import json
import subprocess
import sys
import textwrap

import pytest

from eval.records import Job, Refused, Results, append, digest, made, named, read, spread


def record(variant="a", seed=0, **more):
    return {"variant": variant, "start": "", "seed": seed, "split": "", "average": 1.0, **more}


def test_records_come_back_in_their_order_and_a_job_has_one(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    assert read(path) == []
    assert append(path, record(seed=1, curve=[[1, 2.5]]))
    assert append(path, record(seed=0))
    assert not append(path, record(seed=1, average=9.0))
    assert read(path) == [record(seed=1, curve=[[1, 2.5]]), record(seed=0)]


@pytest.mark.parametrize("torn", ['{"variant": "a", "start": "", "se', "{", '{"variant": "b", "seed": 1}'])
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    append(path, record(seed=0))
    with path.open("a") as file:
        file.write(torn)
    assert read(path) == [record(seed=0)]
    append(path, record(seed=1))
    assert path.read_text() == json.dumps(record(seed=0)) + "\n" + json.dumps(record(seed=1)) + "\n"


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record(seed=0)))
    append(path, record(seed=1))
    assert [each["seed"] for each in read(path)] == [0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{", json.dumps(record())], "x.jsonl, line 1, is no record"),
        ([json.dumps(record()), '{"variant": "a"}\n'], "x.jsonl, line 2, is no record"),
        ([json.dumps(record()), "[1, 2]\n"], "x.jsonl, line 2, is no record"),
        ([json.dumps(record()), "\0" * 40 + "\n"], "x.jsonl, line 2, is no record"),
        ([json.dumps(record()), json.dumps(record(average=2.0))], "line 2, is a second record of a-0"),
    ],
)
def test_what_is_no_record_or_one_too_many_is_refused(tmp_path, lines, message):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    for call in (read, Results.of, lambda path: append(path, record(seed=5))):
        with pytest.raises(Refused, match=message):
            call(path)


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    code = (
        "import sys; from pathlib import Path; from eval.records import append\n"
        "for seed in range(40):\n"
        "    append(Path(sys.argv[1]), dict(variant=sys.argv[2], start='', seed=seed, split='', fill='x' * 5000))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b", "a")]
    assert [each.wait() for each in running] == [0, 0, 0]
    found = [(each["variant"], each["seed"]) for each in read(path)]
    assert sorted(found) == sorted((name, seed) for name in "ab" for seed in range(40))


LOSS = """
WEIGHT = 2.0

class Kept:
    size = 1

def helper(x):
    return WEIGHT * x

def loss(student, teacher):
    return helper(student - teacher)

def other(student, teacher):
    return student
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Calls with a source: the module's functions as they then are."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "my_loss.py").write_text(textwrap.dedent(source))
        sys.modules.pop("my_loss", None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module("my_loss")
        finally:
            sys.dont_write_bytecode = before

    yield write
    sys.modules.pop("my_loss", None)


def test_a_function_stands_by_its_module_name_and_source(own):
    first = named(own(LOSS).loss)
    assert first.startswith("my_loss:loss#")
    assert digest({"align": own(LOSS).loss}) == digest({"align": own(LOSS).loss})
    assert named(own(LOSS.replace("return student\n", "return teacher\n")).loss) == first  # another function
    assert named(own("# a comment above\n" + LOSS).loss) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("helper(student - teacher)", "helper(teacher - student)"),
        ("return WEIGHT * x", "return WEIGHT + x"),
        ("WEIGHT = 2.0", "WEIGHT = 3.0"),
        ("def loss(student, teacher):", "def loss(student, teacher, scale=2):"),
    ],
)
def test_a_change_of_the_function_or_of_what_it_names_is_another_digest(own, old, new):
    first = digest({"align": own(LOSS).loss})
    assert digest({"align": own(LOSS.replace(old, new)).loss}) != first


def test_a_function_without_a_name_in_a_module_is_refused():
    def inner(student, teacher):
        return student

    for function in (inner, lambda student, teacher: student, functools.partial(spread, [1.0])):
        with pytest.raises(ValueError, match="give a function that its module holds by name"):
            digest({"align": function})


def test_rows_and_the_best_are_of_that_split_start_and_those_seeds(tmp_path):
    def add(variant, seed, average, start="", split="s"):
        append(tmp_path / "x", {**Job(variant, start, seed, split).__dict__, "average": average})

    for seed, average in enumerate((1.0, 3.0, 5.0)):
        add("a", seed, average)
        add("a", seed, 90.0, split="other")
        add("a", seed, 90.0, start="other")
        add("b", seed, average + 1)
    add("c", 0, 99.0)
    results = Results.of(tmp_path / "x")
    assert [row["average"] for row in results.rows("a", "", "s", (2, 0))] == [1.0, 5.0]
    assert results.best("abc", "", "s", (0, 1, 2)) == "b"
    assert results.whole("abc", "", "s", (0, 1, 2)) == ["a", "b"]
    assert results.best("abc", "", "s", (0,)) == "c"
    assert results.best("abc", "", "none", (0,)) is None
    assert [spread(values) for values in ([], [2.0], [1.0, 3.0])] == ["-", "2.0", "2.0 ± 1.4"]


def test_made_says_what_those_records_cost():
    first = {"machine": "m", "commit": "a", "seconds": 60.0}
    assert made([first]) == "Made on m at a, 1 minutes of training and judging in all."
    assert made([first, first | {"machine": "n", "commit": "b"}]).startswith("Made on m / n at a, b, 2 minutes")
