"""A checkpoint is refused by a run that is not the one that wrote it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from toy_run import Crash, broken_run, resumed_run, toy_trainer
from transformers import Trainer

from switchkd.data import Conversation, ConversationDataset
from switchkd.models.tiny import tiny_processor
from switchkd.training import checkpoints
from switchkd.training.identity import data_identity, refuse_other_run

# ---- Another configuration


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


def change_arguments(folder, **changes):
    """Change entries of the arguments in a whole checkpoint's run.json."""
    run = json.loads((folder / "run.json").read_text())
    run["arguments"] |= changes
    checkpoints.write_json(folder / "run.json", run)
    reseal(folder)


def reseal(folder):
    step = checkpoints.step_of(folder)
    (folder / "checkpoint.json").unlink()
    checkpoints.seal(folder, step)


def test_resume_under_another_distribution_is_refused(tmp_path, monkeypatch):
    broken_run(tmp_path)
    trainer = toy_trainer(tmp_path, samples=7, gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_deepspeed_enabled", True)
        patch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(zero_stage=2))
        with pytest.raises(ValueError, match="distribution was 'one process' and is now 'ZeRO-2'. Resume with"):
            trainer.train(resume_from_checkpoint=True)
    change_arguments(tmp_path / "checkpoint-4", distribution="ZeRO-2")
    with pytest.raises(ValueError, match="distribution was 'ZeRO-2' and is now 'one process'. Resume with"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.method.fractions == []


def test_distribution_of_two_ranks_is_ddp(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.args = SimpleNamespace(world_size=2)
    assert trainer._distribution() == "DDP"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_whole_checkpoint_without_optimizer_state_is_refused(tmp_path, name):
    broken_run(tmp_path)
    (tmp_path / "checkpoint-4" / name).unlink()
    reseal(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=f"checkpoint-4 has no {name}: resume from another one"):
        resumed_run(tmp_path)


def test_checkpoint_that_deepspeed_does_not_load_is_refused(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path)
    engine = SimpleNamespace(load_checkpoint=lambda *given, **options: (None, None))
    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda self, *given: setattr(self, "model_wrapped", engine))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="checkpoint-4 holds no state of DeepSpeed: resume from another one"):
        trainer._prepare_for_training(6, None, str(tmp_path / "checkpoint-4"))


# ---- Other data


def question(number, answer="yes"):
    content = [[{"type": "text", "text": "is it bent?"}], [{"type": "text", "text": answer}]]
    messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), content, strict=True)]
    return Conversation(f"plate/{number}", messages, [])


@pytest.fixture(scope="module")
def conversations():
    processor = tiny_processor(image_size=8, patch_size=4)
    return lambda *questions: ConversationDataset(questions, processor)


FORMS = [lambda data: data, list]  # encoded when asked for, and in memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([question(1), question(2, "no")], "hash of the (messages|token ids) was '.*' and is now '"),
        ([question(1), question(3)], "hash of the sample ids was '.*' and is now '"),
        ([question(2), question(1)], "hash of the sample ids was '.*' and is now '"),
        ([question(1)], "samples was 2 and is now 1; hash of"),
    ],
)
def test_other_samples_are_refused(tmp_path, conversations, form, now, message):
    before = data_identity(form(conversations(question(1), question(2))))
    checkpoints.write_json(tmp_path / "run.json", before)
    refuse_other_run(tmp_path, data_identity(form(conversations(question(1), question(2)))))
    with pytest.raises(ValueError, match=message):
        refuse_other_run(tmp_path, data_identity(form(conversations(*now))))


@pytest.mark.parametrize(("before", "now"), [FORMS, FORMS[::-1]])
def test_the_same_samples_in_memory_are_no_other_data(tmp_path, conversations, before, now):
    checkpoints.write_json(tmp_path / "run.json", data_identity(before(conversations(question(1)))))
    refuse_other_run(tmp_path, data_identity(now(conversations(question(1)))))
    with pytest.raises(ValueError, match="hash of the sample ids was"):
        refuse_other_run(tmp_path, data_identity(now(conversations(question(2)))))


def test_resume_on_other_samples_of_equal_number_is_refused(tmp_path):
    def trainer(name, **settings):
        made = toy_trainer(tmp_path, samples=7, **settings)
        samples = enumerate(made.train_dataset)
        made.train_dataset = [{**sample, "sample_id": f"{name}{number}"} for number, sample in samples]
        return made

    with pytest.raises(KeyboardInterrupt):
        trainer("a", callbacks=[Crash(5)]).train()
    with pytest.raises(ValueError, match="checkpoint-4 was written by another run: hash of the sample ids was"):
        trainer("b").train(resume_from_checkpoint=True)
    assert trainer("a").train(resume_from_checkpoint=True).global_step == 6
