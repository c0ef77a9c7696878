"""The step: normalisation, terms, rates, hooks, and what is refused before training."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from toy_run import StopAfter, toy_collate, toy_trainer, weights_hash

from switchkd import SwitchKD, Terms
from switchkd.data import Collator, ConversationDataset, to_conversations
from switchkd.data.steel import CLASSES, render_steel
from switchkd.models import freeze
from switchkd.training import DistillTrainer, process_state, training_arguments
from switchkd.training.config import TrainConfig

TOWER = "student.model.vision_tower"


def records(trainer, key="loss"):
    lines = trainer.step_log.path.read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def student_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.method.student.named_parameters()}


class Recorder(DistillTrainer):
    """Keeps the terms of every micro-batch with their step."""

    seen: list

    def backward(self, terms):
        self.seen.append((self.state.global_step, {name: float(value) for name, value in terms.named.items()}))
        super().backward(terms)


# ---- The loss


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    # Plain SGD at rate 1: the weights after a step are the start minus the gradient.
    plain = {
        "optim": "sgd",
        "dropout": 0.0,
        "lr": 1.0,
        "steps": 1,
        "warmup_ratio": 0.0,
        "checkpoint_every": 0,
    }
    whole = toy_trainer(tmp_path / "a", batch_size=4, **plain)
    parts = toy_trainer(tmp_path / "b", batch_size=2, gradient_accumulation_steps=2, **plain)
    start = student_weights(whole)
    whole.train()
    parts.train()
    ends = student_weights(whole), student_weights(parts)
    moved = max((ends[0][name] - start[name]).abs().max() for name in start)
    assert moved > 0.05
    for name in start:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-6)
    assert records(whole)[0]["ce"] == pytest.approx(records(parts)[0]["ce"], abs=1e-5)


def test_terms_are_summed_over_micro_batches_and_averaged_over_steps(tmp_path):
    trainer = toy_trainer(tmp_path, trainer=Recorder, logging_steps=2, gradient_accumulation_steps=2)
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 12
    for index, record in enumerate(records(trainer)):
        window = [terms for step, terms in trainer.seen if step in (2 * index, 2 * index + 1)]
        for name in ("ce", "align"):
            assert record[name] == pytest.approx(sum(terms[name] for terms in window) / 2, rel=1e-5)
        assert record["loss"] == pytest.approx(record["ce"] + 0.5 * record["align"], rel=1e-5)
        assert record["step"] == 2 * index + 2


def test_terms_after_a_resume_are_means_over_the_steps_since(tmp_path):
    every = toy_trainer(tmp_path / "every", logging_steps=1)
    every.train()
    toy_trainer(tmp_path / "cut", logging_steps=3, callbacks=[StopAfter(4)]).train()
    resumed = toy_trainer(tmp_path / "cut", logging_steps=3)
    resumed.train(resume_from_checkpoint=True)
    last_two = [record["ce"] for record in records(every) if record["step"] in (5, 6)]
    record = records(resumed)[-1]
    assert record["step"] == 6
    assert record["ce"] == pytest.approx(sum(last_two) / 2, rel=1e-6)
    assert record["loss"] == pytest.approx(record["ce"] + 0.5 * record["align"], rel=1e-5)


def test_backward_is_the_hook_for_gradients(tmp_path):
    class Doubled(DistillTrainer):
        def backward(self, terms):
            super().backward(Terms(loss=2 * terms.loss))

    settings = {"optim": "sgd", "dropout": 0.0, "steps": 1, "max_grad_norm": 0.0, "warmup_ratio": 0.0}
    moves = []
    for trainer in (DistillTrainer, Doubled):
        run = toy_trainer(tmp_path / trainer.__name__, trainer=trainer, **settings)
        start = student_weights(run)
        run.train()
        end = student_weights(run)
        moves.append(torch.cat([(end[name] - start[name]).flatten() for name in start]))
    assert moves[0].abs().max() > 1e-3
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-3, atol=1e-6)


def test_method_is_told_how_far_the_run_is(tmp_path):
    trainer = toy_trainer(tmp_path, steps=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.method.fractions == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = toy_trainer(tmp_path, checkpoint_every=1)
    with torch.no_grad():
        trainer.method.student.model.multi_modal_projector.linear_1.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("bf16", [False, True])
def test_switch_kd_trains_on_conversations(tmp_path, student, teacher, processor, bf16):
    freeze(student)
    method = SwitchKD(student, teacher, switch="forward_kl")
    data = ConversationDataset(list(to_conversations(render_steel(4, seed=0, size=32), CLASSES))[:8], processor)
    config = TrainConfig(steps=3, batch_size=2, checkpoint_every=3, logging_steps=1, part_lr={TOWER: 1e-4}, bf16=bf16)
    args = training_arguments(config, tmp_path, disable_tqdm=True)
    collate = Collator(processor.tokenizer.pad_token_id)
    trainer = DistillTrainer(method, args, data, data_collator=collate, part_rates=config.part_lr)
    tower, frozen = weights_hash(student.model.vision_tower), weights_hash(teacher)
    trainer.train()
    assert weights_hash(student.model.vision_tower) != tower
    assert weights_hash(teacher) == frozen
    assert len(records(trainer)) == 3
    for record in records(trainer):
        assert record["loss"] == pytest.approx(record["ce"] + record["align"] + record["switch"], rel=1e-4)
    state = load_file(tmp_path / "checkpoint-3" / "method.safetensors")
    assert state
    assert all(name.startswith("student.") for name in state)


# ---- The optimizer


def test_parts_have_their_own_rate_and_norms_do_not_decay(tmp_path):
    trainer = toy_trainer(tmp_path, part_rates={TOWER: 1e-4}, lr=1e-2, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    named = {id(parameter): name for name, parameter in trainer.method.named_parameters()}
    found = {named[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    trained = {name for name, p in trainer.method.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert not any(name.startswith("teacher.") for name in found)
    for name, (rate, decay) in found.items():
        assert rate == (1e-4 if name.startswith(TOWER) else 1e-2), name
        assert decay == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    assert {decay for _, decay in found.values()} == {0.0, 0.1}


def test_rate_of_a_part_scales_its_steps(tmp_path):
    trainer = toy_trainer(tmp_path, part_rates={"student.model.vision_tower": 1e-9}, steps=2, logging_steps=2)
    start = student_weights(trainer)
    trainer.train()
    moves = {name: (end - start[name]).abs().max() for name, end in student_weights(trainer).items()}
    assert max(move for name, move in moves.items() if "vision_tower" in name) < 1e-7
    assert moves["model.multi_modal_projector.linear_1.weight"] > 1e-3
    assert records(trainer)[0]["learning_rate"] > 1e-3  # the rate of the rest


def test_rate_for_a_part_that_is_not_trained_is_refused(tmp_path):
    trainer = toy_trainer(tmp_path, part_rates={"student.vision_tower": 1e-4})
    with pytest.raises(ValueError, match=r"'student\.vision_tower', where nothing is trained; trained are .*model"):
        trainer.create_optimizer()


# ---- What is shown and written


def test_bar_shows_terms_and_starts_at_the_resumed_step(tmp_path, capsys):
    toy_trainer(tmp_path, disable_tqdm=False, callbacks=[StopAfter(4)]).train()
    shown = capsys.readouterr().err
    assert "ce=" in shown
    assert "align=" in shown
    toy_trainer(tmp_path, disable_tqdm=False).train(resume_from_checkpoint=True)
    shown = capsys.readouterr().err
    assert "4/6" in shown
    assert "0/6" not in shown


def test_log_is_cut_to_the_resumed_step(tmp_path):
    toy_trainer(tmp_path, callbacks=[StopAfter(5)]).train()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill while it was written
    trainer = toy_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert [record["step"] for record in records(trainer)] == [1, 2, 3, 4, 5, 6]


def test_runs_share_a_log_file(tmp_path):
    log = tmp_path / "log.jsonl"

    def run(stage, **settings):
        trainer = toy_trainer(tmp_path / stage, log_file=log, log_fields={"stage": stage}, **settings)
        trainer.train(resume_from_checkpoint=True)
        return [(r["stage"], r["step"]) for r in map(json.loads, log.read_text().splitlines()) if "ce" in r]

    first = [("teacher", step) for step in range(1, 7)]
    assert run("teacher") == first
    assert run("student", callbacks=[StopAfter(5)]) == first + [("student", step) for step in range(1, 6)]
    assert run("student") == first + [("student", step) for step in range(1, 7)]
    shutil.rmtree(tmp_path / "student")  # started afresh: its own earlier records go
    assert run("student", steps=2) == [*first, ("student", 1), ("student", 2)]


# ---- What is refused


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("remove_unused_columns", True),
        ("average_tokens_across_devices", False),
        ("save_only_model", True),
        ("dataloader_persistent_workers", True),
    ],
)
def test_arguments_that_train_wrong_are_refused(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}, DistillTrainer needs {not value}"):
        toy_trainer(tmp_path, **{argument: value})


def test_ranks_that_do_not_know_each_other_are_refused(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but this one trains as 1 of 1"):
        DistillTrainer(trainer.method, trainer.args, trainer.train_dataset, data_collator=toy_collate)


def test_fsdp_is_refused_with_what_there_is_instead(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.args.fsdp = ["full_shard"]
    with pytest.raises(ValueError, match=r"fsdp is set: .* DDP or ZeRO-2 \(recipes/accelerate\), and with ZeRO-3 one"):
        DistillTrainer(trainer.method, trainer.args, trainer.train_dataset, data_collator=toy_collate)


# ---- Where it runs


def test_cpu_can_be_chosen_where_there_is_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = training_arguments(TrainConfig(steps=3), tmp_path)
    assert args.use_cpu
    assert args.device == torch.device("cpu")
    assert not args.dataloader_pin_memory
    assert process_state().device == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert not training_arguments(TrainConfig(steps=3), tmp_path).use_cpu


@pytest.mark.parametrize(
    ("accelerator", "asked", "workers"), [(False, None, 0), (True, None, 4), (True, 0, 0), (False, 2, 2)]
)
def test_processes_that_read_data(tmp_path, monkeypatch, accelerator, asked, workers):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    args = training_arguments(TrainConfig(steps=3, data_workers=asked), tmp_path)
    assert args.dataloader_num_workers == workers
