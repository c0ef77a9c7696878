"""The stages of a run: which there are, where each starts, and that their data is checked before any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from switchkd.config import TrainConfig
from switchkd.data.config import DataConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.tiny import tiny_processor
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.stages import StageData, stages_of

STEEL = DataConfig(train_images=3, test_images=2, kinds=("exists",))
FIRST = StageConfig(STEEL, TrainConfig(), freeze=("vision_tower", "language_model"))


def shown(config):
    return [(stage.name, stage.start, stage.config.method is not None) for stage in stages_of(config)]


def test_one_stage_is_trained_with_and_without_the_teacher():
    assert shown(Run(name="a")) == [("undistilled", None, False), ("student", None, True)]


def test_each_stage_starts_from_the_one_before_and_the_control_from_where_the_student_does():
    config = Run(name="a", pretrain=FIRST, sft=replace(FIRST, method=SwitchKDConfig(switch=None)))
    assert shown(config) == [
        ("pretrain", None, False),
        ("sft", "pretrain", True),
        ("undistilled", "sft", False),
        ("student", "sft", True),
    ]
    assert shown(replace(config, undistilled=False, sft=None))[1:] == [("student", "pretrain", True)]
    supervised = replace(config, method=SwitchKDConfig(align=None, switch=None))
    assert shown(supervised)[2:] == [("student", "sft", False)]


def test_the_control_differs_in_its_method_alone():
    undistilled, student = stages_of(Run(name="a"))
    assert replace(undistilled.config, method=student.config.method) == student.config


@pytest.fixture
def config(tmp_path):
    return Run(name="a", out=str(tmp_path), data=STEEL, pretrain=FIRST)


def test_stages_of_one_data_section_share_their_samples(config):
    config = replace(config, data=replace(STEEL, in_memory=True))
    data = StageData(config, stages_of(config), tiny_processor())
    last, first = data.samples(config.data), data.samples(stages_of(config)[0].config.data)
    assert data.samples(config.data) is last
    assert isinstance(last, list)
    assert len(last) == len(first) == 3
    assert len(data.questions(config.data)) == 2


def test_what_a_later_stage_cannot_read_ends_the_run_before_the_first(config):
    missing = DataConfig(source="llava", root=config.out, train_split=f"{config.out}/none.json", test_split=None)
    broken = replace(config, data=missing)
    with pytest.raises(FileNotFoundError, match=r"data.train_split is .*none.json"):
        StageData(broken, stages_of(broken), tiny_processor())
