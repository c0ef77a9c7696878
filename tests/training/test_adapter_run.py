"""Runs whose student is switched through an adapter: fitted before the first step, trained along, kept in checkpoints
and left out of the exported student."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_run import Crash, weights_hash
from transformers import AutoModelForImageTextToText, set_seed

from switchkd.config import Stage
from switchkd.data import Collator, ConversationDataset, to_conversations
from switchkd.data.config import DataConfig
from switchkd.data.steel import CLASSES, render_steel
from switchkd.methods import SwitchKD
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models import freeze
from switchkd.models.adapter import LinearAdapter, fit_switch_adapter
from switchkd.models.config import StudentConfig
from switchkd.models.tiny import TEACHER, random_llava, tiny_processor
from switchkd.runs import RunFolder
from switchkd.tasks import vlm
from switchkd.tasks.vlm import fit_adapter, method_of
from switchkd.tasks.vlm_config import Run
from switchkd.training import DistillTrainer, training_arguments
from switchkd.training.config import TrainConfig
from switchkd.training.stages import train_stage

COARSE = {"hidden": 32, "layers": 1, "vision_hidden": 24, "vision_layers": 1, "image_size": 32, "patch_size": 16}
METHOD = SwitchKDConfig(switch="forward_kl", feature="cosine", switch_adapter="linear")


@pytest.fixture
def narrow(tokenizer):
    """4 visual tokens of width 24; the teacher has 16 of width 32."""
    return random_llava(tokenizer, **COARSE)


@pytest.fixture(scope="module")
def samples():
    conversations = list(to_conversations(render_steel(4, seed=0, size=32), CLASSES))[:8]
    return list(ConversationDataset(conversations, tiny_processor(image_size=32, patch_size=16)))


def trainer_of(folder, narrow, teacher, samples, callbacks=()):
    set_seed(0)
    freeze(narrow)
    adapter = fit_switch_adapter(narrow, teacher, [samples[0]["pixel_values"]])
    method = SwitchKD(narrow, teacher, switch="forward_kl", feature="cosine", switch_adapter=adapter)
    config = TrainConfig(steps=4, batch_size=2, gradient_accumulation_steps=2, checkpoint_every=2, logging_steps=1)
    rates = {"switch_adapter": 1e-2}
    args = training_arguments(config, folder, disable_tqdm=True)
    processor = tiny_processor(image_size=32, patch_size=16)
    return DistillTrainer(
        method,
        args,
        samples,
        processing_class=processor,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        part_rates=rates,
        callbacks=list(callbacks),
    )


def test_a_resumed_run_goes_on_with_the_trained_adapter(tmp_path, tokenizer, teacher, samples):
    def start(folder, *callbacks):
        torch.manual_seed(0)
        return trainer_of(folder, random_llava(tokenizer, **COARSE), teacher, samples, callbacks)

    whole = start(tmp_path / "whole")
    fitted = weights_hash(whole.method.switch_adapter)
    whole.train()
    assert weights_hash(whole.method.switch_adapter) != fitted
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "broken", Crash(3)).train()
    saved = load_file(tmp_path / "broken" / "checkpoint-2" / "method.safetensors")
    own = {name for name in saved if not name.startswith("student.")}
    assert own == {"switch_adapter.linear.weight", "switch_adapter.linear.bias"}
    resumed = start(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert weights_hash(resumed.method.student) == weights_hash(whole.method.student)
    assert weights_hash(resumed.method.switch_adapter) == weights_hash(whole.method.switch_adapter)


def test_the_exported_student_is_stock_and_has_no_adapter(tmp_path, narrow, teacher, samples):
    trainer = trainer_of(tmp_path / "checkpoints", narrow, teacher, samples)
    trainer.train()
    trainer.export_student(tmp_path / "student")
    assert not any("adapter" in name for name in load_file(tmp_path / "student" / "model.safetensors"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    assert weights_hash(loaded) == weights_hash(narrow)


def test_the_pair_is_checked_with_an_adapter_that_is_not_fitted_yet(narrow, teacher):
    stage = Stage("distil", None, "student", DataConfig(), TrainConfig(), method=METHOD)
    method = method_of(stage, narrow, teacher, None)
    assert isinstance(method.switch_adapter, LinearAdapter)
    assert method.switch_adapter.r2 is None
    assert method.feature is not None
    fitted = fit_switch_adapter(narrow, teacher, [torch.randn(2, 3, 32, 32)])
    assert method_of(stage, narrow, teacher, None, fitted).switch_adapter is fitted
    without = replace(stage, method=SwitchKDConfig())
    with pytest.raises(ValueError, match="switch_adapter"):
        method_of(without, narrow, teacher, None)


def test_the_fit_takes_samples_from_the_whole_set(narrow, teacher, samples, monkeypatch, capsys):
    read = []

    class Samples(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    text = {name: value for name, value in samples[0].items() if name != "pixel_values"}
    adapter = fit_adapter(narrow, teacher, Samples([*samples, text]), count=4)
    assert read == [0, 3, 6]
    expected = fit_switch_adapter(narrow, teacher, [samples[index]["pixel_values"] for index in read])
    assert torch.equal(adapter.linear.weight, expected.linear.weight)
    assert f"switch adapter: explains {adapter.r2:.1%} of the variance" in capsys.readouterr().out


def test_a_stage_fits_trains_and_exports(tmp_path, narrow, teacher, samples, capsys):
    narrow.save_pretrained(tmp_path / "start")
    tiny_processor(image_size=32, patch_size=16).save_pretrained(tmp_path / "start")
    config = Run(
        name="a",
        out=str(tmp_path / "runs"),
        undistilled=False,
        student=StudentConfig(path=str(tmp_path / "start")),
        method=METHOD,
        train=TrainConfig(steps=2, batch_size=4, logging_steps=1, checkpoint_every=0),
    )
    run = RunFolder.start(config)
    given = SimpleNamespace(samples=lambda data: samples, processor=tiny_processor(image_size=32, patch_size=16))
    (stage,) = config.stages()
    loaded = vlm.Loaded(config, given, [], None, (teacher, None), (str(TEACHER), torch.float32, None))
    train_stage(vlm, loaded, stage, run)
    assert "switch adapter: explains" in capsys.readouterr().out
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "ce" in record]
    assert len(steps) == 2
    for record in steps:
        total = sum(record[name] for name in ("ce", "align", "switch", "feature"))
        assert record["loss"] == pytest.approx(total, rel=1e-4)
    assert RunFolder.resume(config).config.method.switch_adapter == "linear"
    assert weights_hash(AutoModelForImageTextToText.from_pretrained(run.model("student"))) != weights_hash(narrow)
