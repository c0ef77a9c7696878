"""The command line: quick help, arguments that arrive, one line for what the user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import switchkd
from switchkd.cli import app
from switchkd.runs import RunFolder

VERBS = ("plan", "inspect", "ask", "convert")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="switchkd")


@pytest.fixture
def run_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"name: plate\nout: {tmp_path / 'runs'}\ndata: {{train_images: 4, test_split: null}}\n")
    return file


@pytest.fixture
def planned(monkeypatch):
    """What `switchkd.plan` was called with."""
    calls = []

    def make_plan(config, **options):
        calls.append((config, options))
        return "the plan"

    module = SimpleNamespace(make_plan=make_plan, show=lambda plan, console: console.print(f"shown: {plan}"))
    monkeypatch.setitem(sys.modules, "switchkd.plan", module)
    return calls


def test_the_console_script_lists_the_verbs():
    script = Path(sys.executable).with_name("switchkd")
    ran = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert all(verb in ran.stdout for verb in VERBS)


def test_help_and_usage_errors_import_no_torch():
    code = """
import sys
from switchkd.cli import app
from switchkd.runs import RunFolder
for words in ([], *([verb, "--help"] for verb in sys.argv[1:]), ["ask", "nothing"]):
    try:
        app(words)
    except SystemExit:
        pass
print("imported:", sorted({"torch", "transformers", "numpy"} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True, check=False)
    assert ran.stdout.endswith("imported: []\n"), ran.stdout + ran.stderr


def test_the_public_names_are_there_all_the_same():
    assert {"SwitchKD", "SupervisedMethod", "Terms"} == set(switchkd.__all__)
    assert all(isinstance(getattr(switchkd, name), type) for name in switchkd.__all__)
    with pytest.raises(AttributeError, match="SwitchKid"):
        _ = switchkd.SwitchKid


def test_plan_passes_its_options_and_any_field(planned, run_file):
    fields = ("--train.batch_size", 8, "--data.image_seed=3", "--train.lr", "1e-4")
    options = ("--gpus", 2, "--engine", "zero2", "--gpu", "a100", "--efficiency", 0.4)
    ran = call("plan", *fields[:3], *options[:4], "--config", run_file, *fields[3:], *options[4:])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout == "shown: the plan\n"
    ((config, options),) = planned
    assert (config.name, config.train.batch_size, config.train.lr) == ("plate", 8, 1e-4)
    assert (config.data.image_seed, config.data.train_images) == (3, 4)
    assert options == {"gpu": "a100", "gpus": 2, "engine": "zero2", "efficiency": 0.4}


def test_plan_s_defaults_are_those_of_the_contract(planned, run_file):
    call("plan", "--config", run_file, "--tiny")
    ((config, options),) = planned
    assert config.tiny
    assert options == {"gpu": "h100", "gpus": 8, "engine": "ddp", "efficiency": 0.25}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train.batch_sise", 8), "train.batch_sise"),
        (("--train.batch_size", 0), "train.batch_size is 0, it must be 1 or more"),
        (("stray",), "stray"),
    ],
)
def test_a_wrong_field_is_one_line(planned, run_file, words, message):
    ran = call("plan", "--config", run_file, *words)
    assert ran.exit_code == 2
    assert ran.stderr.startswith("switchkd plan: error: ")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert planned == []


def test_a_missing_configuration_is_one_line(planned, tmp_path):
    ran = call("plan", "--config", tmp_path / "nowhere.yaml")
    assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1)
    assert "nowhere.yaml" in ran.stderr


def test_fields_are_listed_without_a_configuration():
    ran = call("inspect", "--fields")
    assert ran.exit_code == 0
    assert "--train.batch_size" in ran.stdout
    assert "Peak learning rate" in ran.stdout


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_an_error_of_ours_is_one_line_and_status_2(monkeypatch, run_file, error):
    def make_plan(config, **options):
        raise error("this\n  and that")

    monkeypatch.setitem(sys.modules, "switchkd.plan", SimpleNamespace(make_plan=make_plan, show=None))
    ran = call("plan", "--config", run_file)
    assert (ran.exit_code, ran.stderr, ran.stdout) == (2, "switchkd plan: error: this and that\n", "")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, run_file):
    def make_plan(config, **options):
        return {}["unexpected"]

    monkeypatch.setitem(sys.modules, "switchkd.plan", SimpleNamespace(make_plan=make_plan, show=None))
    ran = call("plan", "--config", run_file)
    assert isinstance(ran.exception, KeyError)
    assert "error:" not in ran.stderr


@pytest.fixture
def converted(monkeypatch):
    calls = []
    module = SimpleNamespace(convert=lambda *given, **options: calls.append((given, options)))
    monkeypatch.setitem(sys.modules, "switchkd.convert", module)
    return calls


def test_convert_reads_the_template(converted, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ 裂 }}", encoding="utf-8")
    assert call("convert", tmp_path / "a", tmp_path / "b").exit_code == 0
    ran = call("convert", tmp_path / "a", tmp_path / "b", "--chat-template", tmp_path / "chat.jinja")
    assert ran.exit_code == 0
    folders = (tmp_path / "a", tmp_path / "b")
    assert converted == [(folders, {"chat_template": None}), (folders, {"chat_template": "{{ 裂 }}"})]


def test_convert_refuses_a_missing_template(converted, tmp_path):
    ran = call("convert", tmp_path / "a", tmp_path / "b", "--chat-template", "no.jinja")
    assert ran.exit_code == 2
    message = "--chat-template is no.jinja, which is not a file: name a Jinja file"
    assert ran.stderr == f"switchkd convert: error: {message}\n"
    assert converted == []


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `switchkd train` was about to train."""
    runs = []
    monkeypatch.setattr("switchkd.train.train", runs.append)
    return runs


def test_train_takes_a_configuration_and_fields_or_the_run_to_resume(trained, run_file, tmp_path):
    assert call("train", run_file, "--train.lr", "2e-3").exit_code == 0
    assert call("train", "neu_det", "--data.root", tmp_path).exit_code == 0
    assert [run.name for run in trained] == ["plate", "neu_det"]
    RunFolder.start(trained[0])
    out = tmp_path / "runs"
    for words in (
        ["--name", "plate", "--out", out, "--resume"],
        ["--resume", "--name=plate", f"--out={out}"],
    ):
        ran = call("train", *words, "--data.train_images", "4")
        assert ran.exit_code == 0, ran.stderr
        assert (trained[-1].resume, trained[-1].train.lr, trained[-1].name) == (True, 2e-3, "plate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.lr", "1"], "give CONFIG first, a YAML file or one of `switchkd configs`, or --name NAME --resume"),
        (["quickstart", "--config", "x.yaml"], "CONFIG is quickstart and --config is also given: keep one of them"),
    ],
)
def test_train_without_a_clear_configuration_is_one_line(trained, words, message):
    ran = call("train", *words)
    assert (ran.exit_code, ran.stderr) == (2, f"switchkd train: error: {message}\n")
    assert trained == []
