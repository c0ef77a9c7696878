"""Real processes: SIGKILL and resume, a file size limit, two ranks, and the export loaded elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_run import toy_collate, toy_trainer

from switchkd.training import latest_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (pip install '.[deepspeed]')",
)


def start(settings: dict, launcher=(sys.executable,), code: int = 0, **environment: str):
    """Run toy_run.py with `settings` to its end and return what it wrote to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    script = [str(HERE / "toy_run.py"), json.dumps(settings, default=str)]
    # Its own group, so that a launcher that hangs takes its ranks with it.
    process = subprocess.Popen(
        [*launcher, *script], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        shown = process.communicate(timeout=240)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, shown[-3000:]
    return shown


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def assert_equal(a: Path, b: Path) -> None:
    assert (a / "student/model.safetensors").read_bytes() == (b / "student/model.safetensors").read_bytes()


def assert_close(a: Path, b: Path, atol: float) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---- Kill and resume


@pytest.mark.parametrize(
    ("kill", "newest"), [({"kill_after": 5}, "checkpoint-4"), ({"kill_in_save": 6}, "checkpoint-4")]
)
def test_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path, kill, newest):
    run = {
        "steps": 8,
        "samples": 11,  # three steps an epoch: the newest checkpoint is in the middle of one
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "data_workers": 1,
    }
    start({**run, "out": tmp_path / "whole"})
    start({**run, "out": tmp_path / "killed", **kill}, code=-signal.SIGKILL)
    assert not (tmp_path / "killed" / "student").exists()
    assert latest_checkpoint(tmp_path / "killed").name == newest
    torn = tmp_path / "killed" / ".incomplete" / "checkpoint-6"
    assert torn.exists() == ("kill_in_save" in kill)
    start({**run, "out": tmp_path / "killed", "resume": True})
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert logs[0][:8] == logs[1][:8]
    assert not torn.parent.exists()


def test_a_signal_to_all_processes_leaves_a_checkpoint_of_the_step(tmp_path):
    """As a terminal's Ctrl-C: those that read data are told too."""
    run = {"steps": 6, "samples": 11, "logging_steps": 1, "data_workers": 2}
    start({**run, "out": tmp_path / "whole"})
    shown = start({**run, "out": tmp_path / "stopped", "signal_after": [2, "group"]})
    assert shown.count("SIGINT: a checkpoint follows after this step") == 1
    assert (tmp_path / "stopped" / "interrupted-0").read_text() == "3"
    start({**run, "out": tmp_path / "stopped", "resume": True})
    assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_disk_that_takes_no_more_bytes(tmp_path):
    limit = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    shown = start({"out": tmp_path, "steps": 2}, (sys.executable, "-c", limit), code=1)
    last = shown.strip().splitlines()[-1]
    assert last.startswith("OSError: checkpoint-2 could not be saved in ")
    assert "MiB free): " in last
    assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / ".incomplete").exists()


def test_export_loads_where_this_package_is_never_imported(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    trainer.train()
    trainer.export_student(tmp_path / "student")
    batch = toy_collate([trainer.train_dataset[0]])
    del batch["labels"]
    with torch.no_grad():
        logits = trainer.method.student.eval()(**batch).logits
    save_file({**batch, "logits": logits}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
torch.set_num_threads(int(sys.argv[1]))  # sums differ with it
batch = load_file("expected.safetensors")
logits = batch.pop("logits")
model = AutoModelForImageTextToText.from_pretrained("student")
assert type(model).__name__ == "LlavaForConditionalGeneration"
with torch.no_grad():
    assert torch.equal(model(**batch).logits, logits)
assert not [name for name in sys.modules if name.startswith("switchkd")]
"""
    command = [sys.executable, "-c", script, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Two ranks

# The keys' biases have gradient zero but for rounding, which Adam with its usual epsilon would make steps of.
FOUR = {"steps": 4, "dropout": 0.0, "checkpoint_every": 2, "samples": 16, "adam_epsilon": 1e-5}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    start({**FOUR, "out": out, "batch_size": 4})
    return out


def steps(out: Path) -> list[dict]:
    return [record for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "ce" in record]


def ranks(out: Path) -> int:
    return json.loads((out / "world.json").read_text())["ranks"]


def assert_same_log(a: Path, b: Path) -> None:
    for one, two in zip(steps(a), steps(b), strict=True):
        for name in ("loss", "ce", "align", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])


def test_two_ddp_ranks_equal_one_process(tmp_path, one_process):
    start({**FOUR, "out": tmp_path}, TORCHRUN)
    assert ranks(tmp_path) == 2
    assert_close(one_process, tmp_path, 1e-5)
    assert_same_log(one_process, tmp_path)


def test_two_ddp_ranks_with_accumulation_resume_exactly(tmp_path):
    run = {"steps": 4, "gradient_accumulation_steps": 2, "batch_size": 1, "samples": 16}
    start({**run, "out": tmp_path / "whole"}, TORCHRUN)
    start({**run, "out": tmp_path / "killed", "kill_after": 3}, TORCHRUN, code=1)
    assert latest_checkpoint(tmp_path / "killed").name == "checkpoint-2"
    start({**run, "out": tmp_path / "killed", "resume": True}, TORCHRUN)
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    # One process alone would go on with other random states and batches.
    shown = start({**run, "out": tmp_path / "killed", "resume": True}, code=1)
    assert "world_size was 2 and is now 1" in shown


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path, rank):
    run = {"steps": 4, "batch_size": 1, "samples": 16, "checkpoint_every": 10}
    start({**run, "out": tmp_path / "whole"}, TORCHRUN)
    start({**run, "out": tmp_path / "stopped", "signal_after": [1, rank]}, TORCHRUN)
    said = [(tmp_path / "stopped" / f"interrupted-{each}").read_text() for each in (0, 1)]
    assert said == ["2", "2"]
    assert latest_checkpoint(tmp_path / "stopped").name == f"checkpoint-{said[0]}"
    start({**run, "out": tmp_path / "stopped", "resume": True}, TORCHRUN)
    assert_equal(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("settings", [{}, pytest.param({"zero": 2}, marks=needs_deepspeed)])
def test_two_ranks_measure_what_one_process_does(tmp_path, settings):
    run = {**FOUR, "evaluate": 7, "steps": 1, "checkpoint_every": 0}
    start({**run, "out": tmp_path / "one", "batch_size": 4})
    start({**run, "out": tmp_path / "two", "batch_size": 2, **settings}, TORCHRUN)
    one, two = (json.loads((tmp_path / name / "world.json").read_text())["measured"][0] for name in ("one", "two"))
    for name in ("eval_loss", "eval_ce", "eval_align"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_and_resumes_exactly(tmp_path, one_process, stage):
    run = {**FOUR, "zero": stage}
    start({**run, "out": tmp_path / "whole", "stages": 2 if stage == 2 else 1}, TORCHRUN)
    assert ranks(tmp_path / "whole") == 2
    if stage == 2:
        assert_equal(tmp_path / "whole", tmp_path / "whole/2")
    assert_close(one_process, tmp_path / "whole", 2e-5)
    assert_same_log(one_process, tmp_path / "whole")
    start({**run, "out": tmp_path / "killed", "kill_after": 3}, TORCHRUN, code=1)
    start({**run, "out": tmp_path / "killed", "resume": True}, TORCHRUN)
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    state = load_file(tmp_path / "killed/checkpoint-4/method.safetensors")
    assert not [name for name in state if name.startswith("teacher")]
    assert all(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(("name", "count"), [("cpu", 1), ("ddp", 2), pytest.param("zero2", 2, marks=needs_deepspeed)])
def test_launch_files_start_what_they_say(tmp_path, one_process, name, count):
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    text = path.read_text()
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in text
    assert yaml.safe_load(text)["num_machines"] == 1
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    launcher += ["--num_processes", str(count), "--main_process_port", "0"]
    run = {**FOUR, "batch_size": 4 // count, "out": tmp_path, "expect_zero": name == "zero2", "stages": 2}
    start(run, launcher)
    assert ranks(tmp_path) == count
    assert_close(one_process, tmp_path, 2e-5)
    assert_equal(tmp_path, tmp_path / "2")  # nothing of the first stage is left in the second
