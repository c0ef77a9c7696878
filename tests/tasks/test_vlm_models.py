"""The models of a stage: in the precision and with the attention that the stage names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from switchkd.config import Stage
from switchkd.data.config import DataConfig
from switchkd.runs import RunFolder
from switchkd.tasks import vlm
from switchkd.tasks.vlm_config import Run
from switchkd.training.config import TrainConfig

STEEL = DataConfig(train_images=3, test_images=1, kinds=("exists",))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_student_and_teacher_attend_as_the_stage_says(tmp_path, attention):
    train = TrainConfig(steps=1, batch_size=2, checkpoint_every=0, attn_implementation=attention)
    config = Run(name="a", out=str(tmp_path), data=STEEL, train=train, undistilled=False)
    loaded, run = vlm.load(config), RunFolder.start(config)
    stage: Stage = config.last
    student, _ = vlm.build_student(loaded, stage, run)
    method = vlm.build_method(loaded, stage, student, run)
    for model in (method.student, method.teacher):
        for part in (model.model.language_model, model.model.vision_tower):
            assert part.config._attn_implementation == attention


def test_a_teacher_in_the_precision_of_its_stage_is_loaded_once(tmp_path):
    config = Run(name="a", out=str(tmp_path), data=STEEL, train=TrainConfig(steps=1, checkpoint_every=0))
    loaded, run = vlm.load(config), RunFolder.start(config)
    kept, _ = loaded.teacher
    student, _ = vlm.build_student(loaded, config.last, run)
    assert vlm.build_method(loaded, config.last, student, run).teacher is kept
    half = replace(config.last, train=replace(config.train, bf16=True))
    student, _ = vlm.build_student(loaded, half, run)
    assert vlm.build_method(loaded, half, student, run).teacher.dtype == torch.bfloat16
