"""Configuration files: read as they were written, paths relative to themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from switchkd.config_file import read_yaml, write_yaml
from switchkd.runs import RunFolder
from switchkd.tasks import load_config

TEXTS = [
    "1e-4",
    "1e5",
    "-2.5E+3",
    ".5e1",
    "1e-4x",
    "yes",
    "null",
    "~",
    "0x1F",
    "1_000",
    "12:30:45",
    "2026-11-25",
    "=",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_a_text(tmp_path, text):
    write_yaml({"name": text, "deep": {"list": [text]}}, tmp_path / "a.yaml")
    assert read_yaml(tmp_path / "a.yaml") == {"name": text, "deep": {"list": [text]}}


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("2E5", 2e5), ("1.5e-05", 1.5e-5), ("-1e3", -1e3), ("3", 3)]
)
def test_a_number_as_people_write_it_is_a_number(tmp_path, written, value):
    (tmp_path / "a.yaml").write_text(f"lr: {written}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": value}
    write_yaml({"lr": value}, tmp_path / "b.yaml")
    assert read_yaml(tmp_path / "b.yaml") == {"lr": value}


@pytest.mark.parametrize("name", ["1e-4", "yes", "2026-11-25", "007"])
def test_a_run_of_any_name_resumes(tmp_path, name):
    config = load_config(["--name", name, "--out", str(tmp_path)])
    started = RunFolder.start(config)
    read = load_config(["--name", name, "--out", str(tmp_path), "--resume"])
    assert read.name == name
    assert RunFolder.resume(read).path == started.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "'name' is given twice: keep one of them"),
        ("name: a\ntrain: {lr: 1.0, steps: 3, lr: 2.0}\n", "'lr' is given twice"),
        ("- name\n", "a.yaml holds a list: a configuration is a mapping"),
        ("name: [\n", "a.yaml is not a YAML file that can be read"),
        ("!!python/object/apply:os.system ['true']\n", "a.yaml is not a YAML file that can be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", str(tmp_path / "a.yaml")], prog="run")
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


FILE = """
name: a
data: {source: llava, root: pictures, train_split: talks/train.json, test_split: null}
teacher: {path: models/big}
student: {vision_tower: google/siglip-base-patch16-224, language_model: ./models/small}
"""


def test_paths_are_relative_to_their_file_and_hub_names_stay(tmp_path, monkeypatch):
    place, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    for folder in (place / "models/big", place / "talks", elsewhere):
        folder.mkdir(parents=True)
    (place / "talks/train.json").write_text("[]")
    (place / "run.yaml").write_text(FILE)
    monkeypatch.chdir(elsewhere)
    for given in (str(place / "run.yaml"), "../configs/run.yaml"):
        run = load_config(["--config", given])
        assert run.data.root == str(place / "pictures")
        assert run.data.train_split == str(place / "talks/train.json")
        assert run.teacher.path == str(place / "models/big")
        assert run.student.vision_tower == "google/siglip-base-patch16-224"
        assert run.student.language_model == str(place / "models/small")
    monkeypatch.chdir(place)
    assert load_config(["--config", "run.yaml"]).data.root == "pictures"
    assert load_config(["--config", "run.yaml", "--data.root", "there"]).data.root == "there"


def test_variables_and_absolute_paths_stay(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\ndata: {source: voc, root: $DATA/x}\nteacher: {path: /no/where}\n")
    run = load_config(["--config", str(tmp_path / "run.yaml")])
    assert (run.data.root, run.teacher.path) == ("$DATA/x", "/no/where")


def test_a_run_started_with_relative_paths_resumes_from_another_folder(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "tower").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    started = RunFolder.start(load_config(["--name", "a", "--student.vision_tower", "tower"]))
    monkeypatch.chdir(elsewhere)
    read = load_config(["--config", str(here / "runs/a/config.yaml"), "--resume"])
    assert Path(read.student.vision_tower).samefile(here / "tower")
    assert os.path.samefile(RunFolder.resume(read).path, here / started.path)


def test_a_made_teacher_ends_in_its_own_runs_folder(tmp_path):
    (tmp_path / "big.yaml").write_text("name: big\ndistil: null\nsft: {}\n")
    (tmp_path / "run.yaml").write_text("name: a\nteacher: {made_by: big.yaml}\n")
    run = load_config(["--config", str(tmp_path / "run.yaml"), "--out", "outs"])
    assert run.teacher.path == "outs/big/student"


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("train.stepps", "train.steps"),
        ("data.train_split_", "data.train_split"),
        ("max_length", "data.max_length"),
        ("studnt.path", "student.path"),
    ],
)
def test_a_misspelt_field_is_answered_with_the_nearest(capsys, argument, nearest):
    with pytest.raises(SystemExit):
        load_config(["--name", "a", f"--{argument}", "3"])
    assert f"the nearest field is {nearest}" in capsys.readouterr().err


def test_a_misspelt_field_of_a_file_too(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: a\ntrain: {stepps: 3}\n")
    with pytest.raises(SystemExit):
        load_config(["--config", str(tmp_path / "run.yaml")])
    assert "the nearest field is train.steps" in capsys.readouterr().err


def test_another_teacher_is_not_made_by_the_configuration_of_the_first(tmp_path):
    (tmp_path / "big.yaml").write_text("name: big\ndistil: null\nsft: {}\n")
    (tmp_path / "run.yaml").write_text("name: a\nteacher: {made_by: big.yaml}\n")
    file = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path)]
    for other in ("org/Some-LLaVA", str(tmp_path / "elsewhere")):
        teacher = load_config([*file, "--teacher.path", other]).teacher
        assert (teacher.path, teacher.made_by) == (other, None)
    same = load_config([*file, "--teacher.path", str(tmp_path / "big/student")]).teacher
    assert same.made_by == str(tmp_path / "big.yaml")


def test_a_resumed_run_takes_fields_of_its_own_source(tmp_path):
    given = ["--name", "a", "--out", str(tmp_path)]
    RunFolder.start(load_config([*given, "--data.source", "voc", "--data.root", "/old"]))
    quickstart = Path(__file__).parents[1] / "recipes/configs/quickstart.yaml"
    for default in (None, quickstart):
        run = load_config([*given, "--resume", "--data.root", "/new"], default=default)
        assert (run.data.source, run.data.root, run.resume) == ("voc", "/new", True)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("name: a\nout: ~/runs\ndata: {source: voc, root: ~/plates}\n")
    run = load_config(["--config", str(tmp_path / "run.yaml")])
    assert (run.out, run.data.root) == (str(tmp_path / "runs"), str(tmp_path / "plates"))
