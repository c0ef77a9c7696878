"""The stages of a run: which there are, where each starts and ends, whose sections it has, and that their data is
checked before any of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from switchkd.data.config import DataConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import TeacherConfig
from switchkd.models.tiny import tiny_processor
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.tasks.vlm_data import StageData
from switchkd.training.config import TrainConfig

STEEL = DataConfig(train_images=3, test_images=2, kinds=("exists",))
FIRST = StageConfig(STEEL, TrainConfig(), freeze=("vision_tower", "language_model"))


def shown(config):
    return [(stage.name, stage.start, stage.folder, stage.method is not None) for stage in config.stages()]


def test_one_stage_is_trained_with_and_without_the_teacher():
    assert shown(Run(name="a")) == [("undistilled", None, "undistilled", False), ("distil", None, "student", True)]


def test_each_stage_starts_from_the_one_before_and_the_control_from_where_the_student_does():
    config = Run(name="a", pretrain=FIRST, sft=replace(FIRST, method=SwitchKDConfig(switch=None)))
    assert shown(config) == [
        ("pretrain", None, "pretrain", False),
        ("sft", "pretrain", "sft", True),
        ("undistilled", "sft", "undistilled", False),
        ("distil", "sft", "student", True),
    ]
    assert shown(replace(config, undistilled=False, sft=None))[1:] == [("distil", "pretrain", "student", True)]
    supervised = replace(config, sft=FIRST, distil=None)
    assert shown(supervised) == [("pretrain", None, "pretrain", False), ("sft", "pretrain", "student", False)]
    taught = Run(name="a", teacher=TeacherConfig(steps=3), undistilled=False)
    assert shown(taught) == [("teacher", None, "teacher", False), ("distil", None, "student", True)]


def test_the_control_differs_in_its_method_alone():
    undistilled, student = Run(name="a").stages()
    same = {"name": "distil", "folder": "student", "section": "", "method": student.method}
    assert replace(undistilled, **same) == student


@pytest.fixture
def config(tmp_path):
    return Run(name="a", out=str(tmp_path), data=STEEL, pretrain=FIRST)


def test_stages_of_one_data_section_share_their_samples(config):
    config = replace(config, data=replace(STEEL, in_memory=True))
    data = StageData(config, config.stages(), tiny_processor())
    last, first = data.samples(config.data), data.samples(config.stages()[0].data)
    assert data.samples(config.data) is last
    assert isinstance(last, list)
    assert len(last) == len(first) == 3
    assert len(data.questions(config.data)) == 2


def test_what_a_later_stage_cannot_read_ends_the_run_before_the_first(config):
    missing = DataConfig(source="llava", root=config.out, train_split=f"{config.out}/none.json", test_split=None)
    broken = replace(config, data=missing)
    with pytest.raises(FileNotFoundError, match=r"data.train_split is .*none.json"):
        StageData(broken, broken.stages(), tiny_processor())


# ---- Whose sections a stage has


def test_what_a_stage_leaves_out_is_the_runs():
    own = TrainConfig(lr=2e-5)
    run = Run(name="a", data=STEEL, train=TrainConfig(lr=1e-4), sft=StageConfig(train=own, freeze=("vision_tower",)))
    sft, undistilled, distil = run.stages()
    assert (sft.train, sft.data, sft.freeze, sft.method) == (own, STEEL, ("vision_tower",), None)
    assert (distil.train.lr, distil.data, distil.freeze, distil.method) == (1e-4, STEEL, (), run.method)
    assert [sft.field("train"), sft.field("data"), distil.field("train")] == ["sft.train", "data", "train"]
    assert undistilled.field("freeze") == distil.field("freeze") == "distil.freeze"


def test_stages_of_other_data_have_no_test_part():
    run = Run(name="a", data=STEEL, pretrain=StageConfig(data=replace(STEEL, train_images=5)))
    assert [stage.data.test_split for stage in run.stages()] == [None, "test", "test"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distil": None}, "the run has no stage that trains a student: give pretrain, sft or distil"),
        ({"distil": None, "sft": StageConfig(), "teacher": TeacherConfig(steps=2)}, "teacher.steps is 2 but no stage"),
        ({"method": SwitchKDConfig(align=None, switch=None)}, "every term of method is null, so that stage distil"),
        ({"sft": StageConfig(method=SwitchKDConfig(align=None, switch=None))}, "every term of sft.method is null"),
        (
            {"train": TrainConfig(lr=1.0), "distil": StageConfig(train=TrainConfig())},
            r"train is given but no stage reads it, for each has its own: set that .* \(distil.train\)",
        ),
        ({"data": STEEL, "distil": StageConfig(data=STEEL)}, "data is given but no stage reads it"),
        (
            {"method": SwitchKDConfig(switch=None), "distil": None, "sft": StageConfig()},
            "method is given but no stage reads it, for none learns from a teacher",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Run(name="a", **settings)


@pytest.mark.parametrize(("count", "passes"), [(1, True), (2, False)])
def test_samples_that_cannot_be_held_out_end_the_run_before_the_first_stage(tmp_path, count, passes):
    train = TrainConfig(steps=1, eval_every=1, eval_samples=count)
    config = Run(name="a", out=str(tmp_path), data=STEEL, sft=StageConfig(train=train))
    if passes:
        StageData(config, config.stages(), tiny_processor())
        return
    with pytest.raises(ValueError, match=r"sft\.train\.eval_samples is 2 and there are 3 training samples"):
        StageData(config, config.stages(), tiny_processor())


@pytest.mark.parametrize(("distils", "warned"), [(True, 1), (False, 0)])
def test_a_distilling_stage_without_a_picture_warns(tmp_path, caplog, distils, warned):
    talk = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a?"), ("assistant", "b"))
    ]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    data = DataConfig(source="messages", root=str(tmp_path), train_split=str(tmp_path / "talks.jsonl"), test_split=None)
    stages = {} if distils else {"distil": None, "sft": StageConfig()}
    config = Run(name="a", out=str(tmp_path), data=data, undistilled=False, **stages)
    StageData(config, config.stages(), tiny_processor())
    said = [record.message for record in caplog.records if "picture" in record.message]
    assert len(said) == warned
    assert all(config.last.name in message for message in said)


@pytest.mark.parametrize("best", ["eval_switch", "eval_align"])
def test_what_a_control_cannot_measure_decides_nothing(best):
    train = TrainConfig(eval_every=10, keep_best=best)
    with pytest.raises(ValueError, match=f"keep_best is {best}, and stage undistilled measures eval_loss, eval_ce"):
        Run(name="a", train=train)
    assert Run(name="a", train=train, undistilled=False).last.train.keep_best == best
