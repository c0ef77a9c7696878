"""Checkpoints: what is in them, which are whole, and that a resumed run ends with the same weights."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
from toy_run import ToyMethod, broken_run, resumed_run, toy_trainer, weights_hash
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from switchkd.models.tiny import tiny_processor
from switchkd.training import checkpoints, latest_checkpoint


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of six steps over seven samples, so that two epochs' ends are crossed."""
    trainer = toy_trainer(tmp_path_factory.mktemp("whole"), samples=7, gradient_accumulation_steps=2)
    trainer.train()
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


def test_distances_between_logs_and_checkpoints_may_change(tmp_path, whole_run):
    broken_run(tmp_path)
    resumed = resumed_run(tmp_path, logging_steps=2, checkpoint_every=1)
    assert weights_hash(resumed.method) == weights_hash(whole_run.method)
    assert [record["step"] for record in steps(tmp_path)] == [1, 2, 3, 4, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_all_ranks_go_on_from_the_first_ranks_choice(tmp_path, monkeypatch):
    broken_run(tmp_path)
    sent = []

    def receive(found):
        sent.extend(found)
        return [tmp_path / "checkpoint-2"]  # as if rank 0 had chosen it

    monkeypatch.setattr("switchkd.training.resume.broadcast_object_list", receive)
    assert len(resumed_run(tmp_path).method.fractions) == 8
    assert sent == [tmp_path / "checkpoint-4"]


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
    checkpoints.save_state(method, tmp_path, step=1)
    method.extra = torch.nn.Linear(1, 1)
    del method.temperature
    with pytest.raises(ValueError, match=r"lacks 2 names \['extra.bias'.* 2 unknown ones \['temperature.bias'"):
        checkpoints.load_state(method, tmp_path)


class Poison(TrainerCallback):
    """Makes one weight NaN after step 4, which no log shows."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                model.temperature.bias.fill_(math.nan)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = toy_trainer(tmp_path, keep_checkpoints=1, logging_steps=100, callbacks=[Poison()])
    with pytest.raises(ValueError, match=r"temperature.bias is not finite after step 4, nothing of it is saved: start"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl"]
    assert checkpoints.flaw(tmp_path / "checkpoint-2") is None


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


def zeroed(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(bytes(path.stat().st_size))
    return r"optimizer\.pt has other bytes than were saved"


def zeroed_at_its_end(folder):
    path = folder / "method.safetensors"
    path.write_bytes(path.read_bytes()[:-512] + bytes(512))
    return r"method\.safetensors has other bytes than were saved"


def one_bit_flipped(folder):
    path = folder / "rng_state.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return r"rng_state\.pth has other bytes than were saved"


def exchanged(folder):
    """The state of two steps before, of the same size."""
    shutil.copy(folder.with_name("checkpoint-4") / "method.safetensors", folder / "method.safetensors")
    return r"method\.safetensors has other bytes than were saved"


def unlisted(folder):
    (folder / "scaler.pt").write_bytes(b"1")
    return r"scaler\.pt is not in its checkpoint\.json"


def manifest_zeroed(folder):
    path = folder / "checkpoint.json"
    path.write_bytes(bytes(path.stat().st_size))
    return r"its checkpoint\.json cannot be read"


def renamed(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-4"), folder)
    return r"its checkpoint\.json is of step 4, its name of step 6"


@pytest.mark.parametrize(
    "damage", [zeroed, zeroed_at_its_end, one_bit_flipped, exchanged, unlisted, manifest_zeroed, renamed]
)
def test_damage_that_keeps_the_size_falls_back_to_the_checkpoint_before(tmp_path, whole_run, caplog, damage):
    shutil.copytree(whole_run.args.output_dir, tmp_path, dirs_exist_ok=True)
    reason = damage(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=f"checkpoint-6 is not a whole checkpoint: {reason}; resume from another"):
        resumed_run(tmp_path, tmp_path / "checkpoint-6")
    with caplog.at_level(logging.WARNING):
        resumed = resumed_run(tmp_path)
    assert re.search(f"checkpoint-6 is passed over as a checkpoint: {reason}", caplog.text)
    assert len(resumed.method.fractions) == 4  # micro-batches of steps 5 and 6
    assert weights_hash(resumed.method) == weights_hash(whole_run.method)
    assert checkpoints.flaw(tmp_path / "checkpoint-6") is None


def test_a_checkpoint_may_have_another_name(tmp_path, whole_run):
    shutil.copytree(latest_checkpoint(whole_run.args.output_dir), tmp_path / "kept")
    assert checkpoints.flaw(tmp_path / "kept") is None
    (tmp_path / "checkpoint-6-copy").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_the_newest_and_the_best_stay(tmp_path):
    def left(keep, best=None):
        for step in (2, 4, 10):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-old").mkdir(exist_ok=True)
        checkpoints.rotate(tmp_path, keep, best)
        return sorted(int(path.name[11:]) for path in tmp_path.iterdir() if path.name != "checkpoint-old")

    assert left(2) == [4, 10]
    assert left(1, best=2) == [2, 10]
    assert left(2, best=10) == [4, 10]
    assert left(None) == left(5) == [2, 4, 10]


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


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


def test_student_that_is_not_finite_is_not_exported(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.export_student(tmp_path / "student")
    before = (tmp_path / "student/model.safetensors").read_bytes()
    name, weight = next(iter(trainer.method.student.named_parameters()))
    with torch.no_grad():
        weight[0] = math.inf
    with pytest.raises(ValueError, match=f"{name} is not finite after step 0, nothing of it is saved"):
        trainer.export_student(tmp_path / "student")
    assert (tmp_path / "student/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path)
    on_disk, before_it_stood, replace = [], [], os.replace
    monkeypatch.setattr(checkpoints, "_to_disk", on_disk.append)
    monkeypatch.setattr(os, "replace", lambda *paths: (before_it_stood.extend(on_disk), replace(*paths)))
    trainer.export_student(tmp_path / "student")
    written = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"config.json", "model.safetensors"} <= written
    assert {path.name for path in before_it_stood} == written | {".student.incomplete"}
