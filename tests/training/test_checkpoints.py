"""Checkpoints: what is in them, which are whole, and that a resumed run ends with the same weights."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import pytest
import safetensors.torch
import torch
from toy_run import ToyMethod, toy_trainer, weights_hash
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from switchkd.models.tiny import tiny_processor
from switchkd.training import checkpoints, latest_checkpoint


class Crash(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of six steps over seven samples, so that two epochs' ends are crossed."""
    trainer = toy_trainer(tmp_path_factory.mktemp("whole"), samples=7, gradient_accumulation_steps=2)
    trainer.train()
    return trainer


def broken_run(folder, **settings):
    """The same run, stopped after step 5: its newest checkpoint is of step 4."""
    trainer = toy_trainer(folder, samples=7, gradient_accumulation_steps=2, callbacks=[Crash(5)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def resumed_run(folder, checkpoint=True, **settings):
    trainer = toy_trainer(folder, samples=7, gradient_accumulation_steps=2, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def steps(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"ce"' in line]


# ---- Resume


def test_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path, whole_run):
    broken = broken_run(tmp_path)
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    resumed = resumed_run(tmp_path)
    assert weights_hash(broken.method) != weights_hash(whole_run.method)
    assert weights_hash(resumed.method) == weights_hash(whole_run.method)
    assert steps(tmp_path) == steps(whole_run.step_log.path.parent)


def test_resume_of_a_finished_run_trains_no_further(tmp_path):
    finished = resumed_run(tmp_path, steps=5)  # there is no checkpoint yet: from the start, to the middle of an epoch
    again = resumed_run(tmp_path, steps=5)
    assert again.method.fractions == []
    assert again.state.global_step == 5
    assert weights_hash(again.method) == weights_hash(finished.method)


def test_fresh_start_among_older_checkpoints_is_refused(tmp_path):
    broken_run(tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoint-4 of an earlier run: resume it"):
        toy_trainer(tmp_path).train()


# ---- What a checkpoint holds


def test_checkpoint_holds_the_method_without_its_teacher(whole_run):
    folder = latest_checkpoint(whole_run.args.output_dir)
    state = safetensors.torch.load_file(folder / "method.safetensors")
    assert not [name for name in state if name.startswith("teacher")]
    assert {"temperature.weight", "fraction"} <= state.keys()
    tied = "student.lm_head.weight"
    expected = {name for name in whole_run.method.state_dict() if not name.startswith("teacher.")}
    assert state.keys() == expected - {tied}
    assert state["fraction"] == pytest.approx(5 / 6)


def test_nothing_in_a_checkpoint_needs_unpickling(whole_run):
    from transformers.trainer_pt_utils import safe_globals

    folder = latest_checkpoint(whole_run.args.output_dir)
    names = {path.name for path in folder.iterdir()}
    torch_files = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    text_files = {"checkpoint.json", "run.json", "trainer_state.json", "training_args.json"}
    assert names == torch_files | text_files | {"method.safetensors"}
    for name in torch_files:
        with safe_globals():  # numpy arrays of the random state; how Trainer reads them
            torch.load(folder / name, weights_only=True)
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 1e-2


def test_older_checkpoints_are_removed(whole_run):
    kept = sorted(path.name for path in latest_checkpoint(whole_run.args.output_dir).parent.iterdir())
    assert kept == ["checkpoint-4", "checkpoint-6", "log.jsonl"]


def test_state_of_another_method_is_refused(tmp_path):
    method = ToyMethod()
    checkpoints.save_state(method, tmp_path)
    method.extra = torch.nn.Linear(1, 1)
    del method.temperature
    with pytest.raises(ValueError, match=r"lacks 2 names \['extra.bias'.* 2 unknown ones \['temperature.bias'"):
        checkpoints.load_state(method, tmp_path)


# ---- Torn checkpoints


@pytest.mark.parametrize("name", ["method.safetensors", "optimizer.pt", "rng_state.pth", "checkpoint.json"])
def test_checkpoint_without_one_of_its_files_is_passed_over(tmp_path, whole_run, caplog, name):
    shutil.copytree(whole_run.args.output_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-6" / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert "checkpoint-6 is passed over" in caplog.text
    assert name in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-6 is not a whole checkpoint: .*{name}"):
        resumed_run(tmp_path, tmp_path / "checkpoint-6")


def test_truncated_file_is_found(tmp_path, whole_run):
    shutil.copytree(whole_run.args.output_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-7])
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    assert "bytes instead of" in checkpoints.flaw(path.parent)
    (path.parent / "checkpoint.json").write_text('{"step": 6, "fil')
    assert checkpoints.flaw(path.parent) == "its checkpoint.json cannot be read"


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


# ---- Another run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_config": {"method": {"switch": "jsd"}}}, "method.switch was 'dbild' and is now 'jsd'"),
        ({"lr": 2e-2}, "learning_rate was 0.01 and is now 0.02"),
        ({"batch_size": 3}, "per_device_train_batch_size was 2 and is now 3"),
        ({"part_rates": {"temperature": 0.5}}, "rates.temperature was None and is now 0.5"),
        ({"samples": 8}, "samples was 7 and is now 8"),
    ],
)
def test_resume_under_another_configuration_is_refused(tmp_path, change, message):
    config = {"run_config": {"method": {"switch": "dbild"}}}
    broken_run(tmp_path, **config)
    trainer = toy_trainer(tmp_path, **{"samples": 7, "gradient_accumulation_steps": 2, **config, **change})
    with pytest.raises(ValueError, match=f"{message}. Resume with the saved value, or start a new run"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.method.fractions == []


# ---- A full disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def zip_writer_on_a_full_disk(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("where", "failure", "reason"),
    [
        ("torch.save", full_disk, "No space left on device"),
        ("torch.save", zip_writer_on_a_full_disk, "unexpected pos"),
        ("switchkd.training.checkpoints.save_file", full_disk, "No space left on device"),
        ("switchkd.training.checkpoints.seal", full_disk, "No space left on device"),
    ],
)
def test_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoint(
    tmp_path, whole_run, monkeypatch, where, failure, reason
):
    fill = FillDisk(lambda: monkeypatch.setattr(where, failure))
    trainer = toy_trainer(tmp_path, samples=7, gradient_accumulation_steps=2, callbacks=[fill])
    with pytest.raises(OSError, match=f"checkpoint-4 could not be saved in {tmp_path} .* MiB free.: .*{reason}"):
        trainer.train()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert weights_hash(resumed_run(tmp_path).method) == weights_hash(whole_run.method)


class FillDisk(TrainerCallback):
    def __init__(self, fill):
        self.fill = fill

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.fill()


# ---- The export


def test_student_export_is_a_stock_checkpoint(tmp_path, whole_run):
    processor = tiny_processor(image_size=8, patch_size=4)
    trainer = toy_trainer(tmp_path, processing_class=processor)
    trainer.export_student(tmp_path / "student")
    first = weights_hash(AutoModelForImageTextToText.from_pretrained(tmp_path / "student"))
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))  # Trainer's name for it; the older export is replaced
    student = trainer.method.student.eval()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, student(**batch).logits)
    assert weights_hash(loaded) == weights_hash(student) != first
    assert AutoProcessor.from_pretrained(tmp_path / "student").chat_template == processor.chat_template
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert "training_args.bin" not in names
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    keys = safetensors.torch.load_file(tmp_path / "student" / "model.safetensors").keys()
    assert not [key for key in keys if "teacher" in key or "student" in key]


def test_export_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path)
    trainer.export_student(tmp_path / "student")
    monkeypatch.setattr(type(trainer.method.student), "save_pretrained", full_disk)
    with pytest.raises(OSError, match=r"the student could not be saved in .*No space left.*student is whole"):
        trainer.export_student(tmp_path / "student")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
