"""How a recipe ends: one line for what the user can mend, the command that goes on for an interruption."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from switchkd import train
from switchkd.runs import RunFolder, Stopped
from switchkd.tasks import load_config, task_of, vlm
from switchkd.training import stages


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("a\nb"), FileNotFoundError("a b"), OSError("a b")])
def test_what_the_user_can_mend_is_one_line(capsys, monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["recipes/make.py"])
    assert train.one_line(raising(error)) == 2
    assert capsys.readouterr().err == "make.py: error: a b\n"
    assert train.one_line(raising(error), "train") == 2
    assert capsys.readouterr().err == "switchkd train: error: a b\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        train.one_line(raising(RuntimeError("a bug")))


@pytest.mark.parametrize(("verb", "command"), [("", "python recipes/make.py"), ("train", "switchkd train")])
def test_an_interruption_ends_as_the_command_that_goes_on(capsys, monkeypatch, tmp_path, verb, command):
    monkeypatch.setattr(sys, "argv", ["recipes/make.py", "--train.lr", "1"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    run = SimpleNamespace(path=tmp_path / "a run")
    assert train.one_line(raising(Stopped("stage sft, checkpoint-3 is saved", run)), verb) == 130
    said = (
        f"stopped: stage sft, checkpoint-3 is saved; go on with: {command} --name 'a run' --out {tmp_path} --resume\n"
    )
    assert capsys.readouterr().err.endswith(said)


def test_an_interruption_names_its_stage_and_the_run_goes_on(tmp_path, monkeypatch):
    data = ["--data.train_images", "4", "--data.test_split", "null", "--train.steps", "1", "--out", str(tmp_path)]
    config = load_config(["--name", "plate", *data])
    train_stage, seen = stages.train_stage, []

    def stopped(task, loaded, stage, run):
        seen.append(stage.name)
        if stage.name == "distil" and seen.count("distil") == 1:
            raise KeyboardInterrupt("checkpoint-1 is saved")
        train_stage(task, loaded, stage, run)

    monkeypatch.setattr(stages, "train_stage", stopped)
    with pytest.raises(Stopped, match="stage distil, checkpoint-1 is saved") as stop:
        stages.train_run(vlm, config)
    assert stop.value.resume == ["--name", "plate", "--out", str(tmp_path), "--resume"]
    with pytest.raises(FileExistsError, match="holds a run that is not finished"):
        RunFolder.check(config)
    again = load_config(stop.value.resume)
    assert task_of(again) is vlm
    stages.train_run(vlm, again)
    assert seen == ["undistilled", "distil", "distil"]
    assert (tmp_path / "plate/student/model.safetensors").is_file()
    RunFolder.check(config)


def test_a_wrong_choice_ends_before_torch_is_imported():
    code = """
import sys
from switchkd.tasks import load_config
try:
    load_config(sys.argv[1:])
except SystemExit:
    print(sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""
    for argument in (["--method.switch", "foo"], ["--data.source", "x"], ["--train.lr", "0"], ["--help"]):
        ran = subprocess.run([sys.executable, "-c", code, "--name", "a", *argument], capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "[]", ran.stderr
