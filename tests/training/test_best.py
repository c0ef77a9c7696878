"""The best checkpoint: measured, kept and taken, also by a run that was interrupted."""

from __future__ import annotations

import pytest
import torch
from toy_run import Crash, ToyData, toy_trainer, weights_hash
from transformers import AutoModelForImageTextToText, TrainerCallback

from switchkd.training import checkpoints
from switchkd.training.best import best_step
from switchkd.training.held_out import hold_out
from switchkd.training.identity import data_identity


class Worse(TrainerCallback):
    """After step 3 the weights only get worse."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step >= 3:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.neg_()


class Keep(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = weights_hash(model.student)


def run(folder, *callbacks, **settings):
    settings = {"eval_every": 1, "keep_best": "eval_ce", "keep_checkpoints": 1, "checkpoint_every": 4, **settings}
    settings |= {"samples": 5, "batch_size": 5, "warmup_ratio": 0.0, "lr": 1e-2}
    return toy_trainer(
        folder, eval_dataset=ToyData(5), steps=8, dropout=0.0, callbacks=[Worse(), *callbacks], **settings
    )


def kept(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept_and_exported(tmp_path, capsys):
    keep = Keep()
    trainer = run(tmp_path, keep)
    trainer.train()
    measured = {r["step"]: r["eval_ce"] for r in trainer.state.log_history if "eval_ce" in r}
    best = min(measured, key=measured.get)
    assert 1 < best < 8
    assert sorted(measured) == list(range(1, 9))
    assert kept(tmp_path) == [best, 8]
    assert weights_hash(trainer.method.student) == keep.after[best] != keep.after[8]
    trainer.export_student(tmp_path / "student")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    assert weights_hash(exported) == keep.after[best]
    assert f"the best of 8 steps is {best}: eval_ce {measured[best]:.6g}" in capsys.readouterr().out
    again = trainer.evaluate()["eval_ce"]
    assert again == pytest.approx(measured[best], rel=1e-6)


@pytest.mark.parametrize("crash", [2, 5, 7])
def test_a_resumed_run_knows_what_was_best_before(tmp_path, crash):
    whole = run(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Crash(crash)).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert weights_hash(resumed.method) == weights_hash(whole.method)
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    finished = run(tmp_path / "cut")  # ended before it was exported
    finished.train(resume_from_checkpoint=True)
    assert finished.method.fractions == []
    assert weights_hash(finished.method) == weights_hash(whole.method)


def test_a_best_checkpoint_that_is_torn_is_no_model(tmp_path):
    run(tmp_path).train()
    best = kept(tmp_path)[0]
    path = tmp_path / f"checkpoint-{best}" / "method.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match=f"checkpoint-{best} is not a whole checkpoint: method.safetensors has other"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_the_last_step_is_measured_too(tmp_path):
    trainer = run(tmp_path, eval_every=3, keep_best=None)
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "eval_ce" in r] == [3, 6, 8]


def test_a_measurement_that_there_is_not_ends_the_run_in_its_first_step(tmp_path):
    trainer = run(tmp_path, keep_best="eval_cross_entropy")
    with pytest.raises(ValueError, match="which is not measured: an evaluation has eval_loss, eval_ce, eval_align"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_lowest_first_finite_value_is_best():
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "e": float("nan")}, {"step": 4, "e": 2.0}]
    assert best_step(records, "e") == 4
    assert best_step([*records, {"step": 6, "e": 1.0}, {"step": 8, "e": 1.0}], "e") == 6
    assert best_step(records[:2], "e") is None


# ---- Held out samples


def test_held_out_samples_are_spread_and_none_is_trained_on():
    train, held = hold_out(list(range(10)), 3, "train.eval_samples")
    assert list(held) == [0, 3, 6]
    assert list(train) == [1, 2, 4, 5, 7, 8, 9]
    assert len(hold_out(ToyData(200), None, "train.eval_samples")[1]) == 100
    with pytest.raises(ValueError, match="sft.train.eval_samples is 6 and there are 10 training samples"):
        hold_out(list(range(10)), 6, "sft.train.eval_samples")


def test_a_share_has_lengths_and_an_identity_of_its_own():
    data = ToyData(10)
    train, held = hold_out(data, 3, "")
    assert train.lengths == [data.lengths[index] for index in (1, 2, 4, 5, 7, 8, 9)]
    assert torch.equal(held[1]["input_ids"], data[3]["input_ids"])
    assert data_identity(train) != data_identity(held) != data_identity(data)
    assert data_identity(train)["data"] == data_identity(data)["data"]
    encoded = hold_out([data[index] for index in range(10)], 3, "")[0]
    assert encoded.lengths == train.lengths
    with pytest.raises(ValueError, match="has no `lengths`"):
        _ = hold_out(tuple(range(10)), 3, "")[0].lengths


def test_a_run_trains_on_its_share(tmp_path):
    train, held = hold_out(ToyData(12), 4, "")
    trainer = toy_trainer(tmp_path, eval_every=2, eval_dataset=held)
    trainer.train_dataset = train
    trainer.train()
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-6"
