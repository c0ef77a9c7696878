"""The plan of a rehearsed true-size configuration against what its stages take when they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from measured import measured_peak

from switchkd.data.conversations.encoding import Collator
from switchkd.models import freeze, load_llava, shared_vocab
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora
from switchkd.models.pair import as_teacher_reads, teacher_processor
from switchkd.models.students import build_student
from switchkd.plan import make_plan
from switchkd.plan.gpus import ALLOWANCE
from switchkd.tasks import load_config
from switchkd.tasks.vlm import method_of
from switchkd.tasks.vlm_data import StageData
from switchkd.tasks.vlm_rehearsal import rehearse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["tinyllava_3b_to_0.5b", "tinyllava_3b_to_0.5b_lora", "llava_7b_to_1.1b"])
def test_memory_of_every_stage_is_the_peak_of_a_real_step(tmp_path, monkeypatch, name):
    """Both over the longest batch of the stage; a real run on the CPU has no GPU's context, which is taken off."""
    monkeypatch.chdir(ROOT)
    config = rehearse(load_config(["--config", f"recipes/configs/{name}.yaml", "--out", str(tmp_path)]))
    reads = teacher_processor(config.teacher)
    config = replace(config, student=as_teacher_reads(config.student, config.teacher, reads))
    plan = make_plan(config, gpus=1)
    assert [problem.text for problem in plan.problems if problem.stops] == []
    teacher, _ = load_llava(config.teacher.path, torch.bfloat16)
    for stage, planned in zip(config.stages(), plan.stages, strict=True):
        student, processor = build_student(config.student)
        freeze(student, stage.freeze)
        method = method_of(stage, student, teacher, shared_vocab(processor.tokenizer, reads.tokenizer))
        train = stage.train
        if train.lora_rank:
            add_lora(student, train.lora_rank, train.lora_alpha, train.lora_dropout)
        if train.gradient_checkpointing:
            recompute_activations(student)
        assert sum(p.numel() for p in student.parameters()) == sum(map(sum, planned.parameters.values()))
        samples = StageData(config, [stage], processor).samples(stage.data)
        with_one = [i for i, each in enumerate(samples.conversations) if len(each.images) == 1]
        longest = sorted(with_one, key=lambda index: -samples.lengths[index])[: train.batch_size]
        batch = Collator(processor.tokenizer.pad_token_id)([samples[index] for index in longest])
        assert batch["input_ids"].shape == (train.batch_size, planned.survey.longest)
        measured = measured_peak(method, batch, train.bf16, planned.accumulation)
        assert sum(planned.memory.values()) - ALLOWANCE == pytest.approx(measured, rel=0.15), stage.name
