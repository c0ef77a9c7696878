"""The `train` section: each field acts, and what contradicts itself or Trainer is refused by name."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from typing import get_args

import pytest
import torch
from toy_run import StopAfter, ToyData, resumed_run, toy_trainer, weights_hash
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from switchkd.training import training_arguments
from switchkd.training.arguments import MODULES, check_settings
from switchkd.training.config import DECIDED, ELSEWHERE, REQUIRED, Optimizer, Scheduler, TrainConfig


def train(**settings):
    return TrainConfig(**{"steps": 10, **settings})


def test_training_arguments_follow_the_config(tmp_path):
    config = TrainConfig(steps=9, batch_size=3, warmup_ratio=0.5, checkpoint_every=0, max_grad_norm=0.5, lr=2e-4)
    args = training_arguments(config, tmp_path, seed=5, dataloader_num_workers=1)
    assert (args.max_steps, args.per_device_train_batch_size, args.seed) == (9, 3, 5)
    assert (args.learning_rate, args.max_grad_norm, args.dataloader_num_workers) == (2e-4, 0.5, 1)
    assert args.get_warmup_steps(9) == 5
    assert args.save_strategy == "no"
    assert not args.logging_nan_inf_filter


def test_steps_have_to_be_settled():
    for config in (TrainConfig(), TrainConfig(steps=3, global_batch_size=16)):
        with pytest.raises(ValueError, match=r"train.steps is not known yet: pass config.settled"):
            training_arguments(config, "nowhere")


# ---- Optimizer and schedule


def test_names_are_trainers_own():
    assert set(get_args(Optimizer)) <= {each.value for each in OptimizerNames}
    assert set(get_args(Scheduler)) - {"multistep"} <= {each.value for each in SchedulerType}
    assert MODULES.keys() <= set(get_args(Optimizer))


def test_the_default_optimizer_is_trainers(tmp_path):
    """As transformers has it from torch 2.8 on."""
    assert TrainConfig().optimizer == training_arguments(train(), tmp_path).optim == "adamw_torch_fused"
    if torch.__version__ >= "2.8":
        assert TrainingArguments(str(tmp_path), use_cpu=True).optim == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", "SGD"), ("adagrad", "Adagrad"), ("adafactor", "Adafactor"), ("adamw_torch", "AdamW")]
)
def test_an_optimizer_by_its_name_trains(tmp_path, name, kind):
    extra = {"optim_args": "momentum=0.9"} if name == "sgd" else {}
    trainer = toy_trainer(tmp_path, optimizer=name, extra=extra, lr=1e-3, steps=2)
    start = weights_hash(trainer.method.student)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == kind
    assert trainer.optimizer.param_groups[0].get("momentum", 0.9) == 0.9
    assert weights_hash(trainer.method.student) != start


def rates(tmp_path, **settings):
    trainer = toy_trainer(tmp_path, lr=1.0, optimizer="sgd", max_grad_norm=1e-9, checkpoint_every=0, **settings)
    trainer.train()
    return [record["learning_rate"] for record in trainer.state.log_history if "learning_rate" in record]


@pytest.mark.parametrize(
    ("scheduler", "extra", "expected"),
    [
        ("linear", {}, [1, 0.75, 0.5, 0.25]),
        ("constant_with_warmup", {}, [1, 1, 1, 1]),
        ("cosine", {}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 0.5}}, [1, 0.9267767, 0.75, 0.5732233]),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 2}}, [1, 1, 1, 0.5]),
    ],
)
def test_a_schedule_by_its_name(tmp_path, scheduler, extra, expected):
    found = rates(tmp_path, steps=4, scheduler=scheduler, warmup_ratio=0.0, extra=extra)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"milestones": (2, 4)}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"milestones": (0.5,), "milestone_factor": 0.5}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ({"milestones": (4,), "warmup_ratio": 0.5}, [0, 1 / 3, 2 / 3, 1, 0.1, 0.1]),
    ],
)
def test_milestones(tmp_path, settings, expected):
    found = rates(tmp_path, steps=6, scheduler="multistep", **{"warmup_ratio": 0.0, **settings})
    assert found == pytest.approx(expected, abs=1e-9)


def test_milestones_go_on_after_a_resume(tmp_path):
    settings = {"scheduler": "multistep", "milestones": (3, 5), "warmup_ratio": 0.2, "lr": 1e-2}
    whole = resumed_run(tmp_path / "whole", **settings)
    resumed_run(tmp_path / "cut", **settings, callbacks=[StopAfter(4)])
    resumed = resumed_run(tmp_path / "cut", **settings)
    assert weights_hash(resumed.method) == weights_hash(whole.method)
    with pytest.raises(ValueError, match="lr_scheduler_kwargs.milestones was .3, 5. and is now .3, 4."):
        resumed_run(tmp_path / "cut", **{**settings, "milestones": (3, 4)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": (2,)}, "train.milestones or train.milestone_factor is given and train.scheduler is cosine"),
        ({"milestone_factor": 0.5}, "train.milestones or train.milestone_factor is given"),
        ({"scheduler": "multistep"}, "train.scheduler is multistep without train.milestones"),
        ({"scheduler": "multistep", "milestones": (4, 2)}, "each above the one before"),
        ({"scheduler": "multistep", "milestones": (2, 2)}, "each above the one before"),
        ({"scheduler": "multistep", "milestones": (1.5,)}, "give steps, or shares"),
        ({"scheduler": "multistep", "milestones": (0,)}, "give steps, or shares"),
        ({"scheduler": "multistep", "milestones": (0.5, 8)}, "give either steps or shares"),
        ({"part_lr": {"vision_tower": 0.0}}, "train.part_lr.vision_tower is 0.0, it must be above 0"),
    ],
)
def test_rates_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_a_part_that_is_none_is_refused_with_the_nearest():
    settings = train(part_lr={"vision_towr": 1e-4})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        settings.check_parts(("vision_tower", "projector"), "sft.train")
    assert str(error.value) == (
        "sft.train.part_lr names vision_towr, which is no part of the model; known are vision_tower, projector; did "
        "you mean vision_tower?"
    )
    settings.check_parts(("vision_towr",))


def test_parts_have_their_rates_whatever_they_are_called(tmp_path):
    parts = {"eyes": ("student.model.vision_tower",), "tongue": ("student.model.language_model", "student.lm_head")}
    trainer = toy_trainer(tmp_path, part_rates={"tongue": 1e-5, "eyes": 1e-6}, parts=parts, lr=1e-2)
    named = {id(p): name for name, p in trainer.method.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for name in (named[id(parameter)] for parameter in group["params"]):
            rate = 1e-5 if "language_model" in name or "lm_head" in name else 1e-6 if "vision_tower" in name else 1e-2
            assert group["lr"] == rate, name
    trainer = toy_trainer(tmp_path, part_rates={"ears": 1e-5}, parts=parts)
    with pytest.raises(
        ValueError, match="a learning rate is given for 'ears', which is no part; known are eyes, tongue"
    ):
        trainer.create_optimizer()


# ---- The rest


def test_numbers_of_the_evaluation_follow_the_config(tmp_path):
    args = training_arguments(train(eval_every=3, batch_size=5), tmp_path)
    assert (args.eval_strategy, args.eval_steps, args.per_device_eval_batch_size) == ("steps", 3, 5)
    assert training_arguments(train(), tmp_path).eval_strategy == "no"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_samples": 5}, "train.eval_samples is 5 without train.eval_every"),
        ({"keep_best": "ce", "eval_every": 1}, "train.keep_best is ce: name a measurement, eval_loss or eval_"),
        ({"keep_best": "eval_ce"}, "train.keep_best is eval_ce with train.eval_every 0 and train.checkpoint_every 100"),
        ({"keep_best": "eval_ce", "eval_every": 2, "checkpoint_every": 0}, "it needs both above 0"),
        ({"eval_every": -1}, "train.eval_every is -1, it must be 0 or more"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(**settings)


def test_the_method_is_compiled(tmp_path):
    settings = {"torch_compile": True, "extra": {"torch_compile_backend": "eager"}, "dropout": 0.0, "steps": 2}
    compiled = toy_trainer(tmp_path / "compiled", **settings)
    compiled.train()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    plain = toy_trainer(tmp_path / "plain", dropout=0.0, steps=2)
    plain.train()
    for one, other in zip(plain.method.parameters(), compiled.method.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- Extra


def test_extra_goes_to_the_arguments_as_it_is(tmp_path):
    extra = {"adam_beta2": 0.95, "data_seed": 3, "per_device_eval_batch_size": 1}
    args = training_arguments(train(batch_size=4, extra=extra), tmp_path)
    assert (args.adam_beta2, args.data_seed, args.per_device_eval_batch_size) == (0.95, 3, 1)
    assert training_arguments(train(extra=extra), tmp_path, adam_beta2=0.9).adam_beta2 == 0.95
    trainer = toy_trainer(tmp_path, extra={"adam_beta2": 0.5})
    assert trainer.create_optimizer().param_groups[0]["betas"] == (0.9, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 1e-4, "train.extra sets learning_rate: set train.lr instead"),
        ("optim", "sgd", "train.extra sets optim: set train.optimizer instead"),
        ("eval_steps", 4, "train.extra sets eval_steps: set train.eval_every instead"),
        ("seed", 4, "train.extra sets seed: that is the run's seed"),
        ("fsdp", "full_shard", "train.extra sets fsdp: that is the files of recipes/accelerate"),
        (
            "label_smoothing_factor",
            0.1,
            "sets label_smoothing_factor to 0.1: it has to be 0.0, the loss is the method's",
        ),
        (
            "ignore_data_skip",
            True,
            "sets ignore_data_skip to True: it has to be False, a resumed run would see samples",
        ),
        ("dataloader_in_order", False, "sets dataloader_in_order to False: it has to be True"),
    ],
)
def test_extra_that_would_train_wrong_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        train(extra={name: value})


def test_extra_may_say_what_has_to_be(tmp_path):
    assert training_arguments(train(extra={"ignore_data_skip": False}), tmp_path).ignore_data_skip is False


@pytest.mark.parametrize(
    ("name", "nearest"), [("adam_beta_2", "adam_beta2"), ("warmup_step", "warmup_steps"), ("dataloader_seed", "data")]
)
def test_extra_of_another_name_is_refused_with_the_nearest(tmp_path, name, nearest):
    with pytest.raises(
        ValueError, match=rf"sft\.train\.extra sets {name}, which TrainingArguments does not have"
    ) as error:
        check_settings(train(extra={name: 1}), "sft.train")
    assert f"did you mean {nearest}" in str(error.value)
    with pytest.raises(ValueError, match="which TrainingArguments does not have"):
        training_arguments(train(extra={name: 1}), tmp_path)


def test_what_is_refused_is_there_to_be_set():
    """So that a name that transformers drops is noticed here."""
    known = {each.name for each in fields(TrainingArguments)}
    only_newer = {"activation_checkpointing"}
    assert {*DECIDED, *ELSEWHERE, *REQUIRED} - only_newer <= known
    assert set(DECIDED.values()) <= {each.name for each in fields(TrainConfig)}


def test_what_is_required_is_set(tmp_path):
    args = training_arguments(train(), tmp_path)
    assert {name: getattr(args, name) for name in REQUIRED} == {name: value for name, (value, _) in REQUIRED.items()}


@pytest.mark.parametrize("scheduler", ["warmup_stable_decay", "cosine_with_min_lr"])
def test_a_schedule_without_its_settings_is_refused_before_training(scheduler):
    with pytest.raises(
        ValueError, match=rf"train\.scheduler is {scheduler} with lr_scheduler_kwargs None: .*; give train"
    ):
        check_settings(train(scheduler=scheduler))
    with pytest.raises(ValueError, match="with lr_scheduler_kwargs {'min': 1}"):
        check_settings(train(extra={"lr_scheduler_kwargs": {"min": 1}}))


@pytest.mark.parametrize("scheduler", ["multistep", "constant_with_warmup"])
def test_settings_of_a_schedule_that_takes_none_are_refused(scheduler):
    milestones = (4,) if scheduler == "multistep" else ()
    with pytest.raises(ValueError, match=f"and train.scheduler is {scheduler}, which takes none"):
        train(scheduler=scheduler, milestones=milestones, extra={"lr_scheduler_kwargs": {"min_lr": 1}})


# ---- Packages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"report_to": ("wandb",)},
            "train.report_to names wandb, which is not installed: pip install wandb, or drop it",
        ),
        ({"report_to": ("tensorboard", "trackio")}, "train.report_to names tensorboard, which is not installed"),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer is paged_adamw_8bit, which needs bitsandbytes: install it, or"),
        ({"optimizer": "adamw_torch_4bit"}, "optimizer is adamw_torch_4bit, which needs torchao"),
        ({"optimizer": "stable_adamw"}, "optimizer is stable_adamw, which needs optimi"),
    ],
)
def test_packages_that_are_missing_are_named_before_training(monkeypatch, settings, message):
    ours = ("torch", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ours)
    check_settings(train())
    with pytest.raises(ValueError, match=message):
        check_settings(train(**settings))


def test_records_go_to_tensorboard_in_the_runs_folder(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"log_file": tmp_path / "log.jsonl", "log_fields": {"stage": "distil"}, "report_to": ("tensorboard",)}
    toy_trainer(tmp_path / "checkpoints", steps=2, eval_every=1, eval_dataset=ToyData(3), **settings).train()
    written = reader.EventAccumulator(str(tmp_path / "tensorboard" / "distil"))
    written.Reload()
    assert {"train/ce", "train/loss", "eval/align"} <= set(written.Tags()["scalars"])
    assert [event.step for event in written.Scalars("train/ce")] == [1, 2]
