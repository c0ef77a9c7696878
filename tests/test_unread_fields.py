"""Fields that nothing would read, given by someone who thinks that they act: refused, naming both."""

from __future__ import annotations

import pytest

from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.tasks.vlm_rehearsal import _tiny_data

VOC = MixtureConfig("voc", root="a", split="train")


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        (
            StudentConfig,
            {"path": "s", "vision_feature_layer": -1},
            "student.vision_feature_layer is -1 but student.path is s, a whole student with its own: drop student.path",
        ),
        (
            StudentConfig,
            {"path": "s", "vision_feature_select_strategy": "full"},
            "student.vision_feature_select_strategy is full but student.path is s",
        ),
        (StudentConfig, {"path": "s", "image_processor": "p"}, "student.image_processor is p but student.path is s"),
        (StudentConfig, {"path": "s", "vision_tower": "t"}, "student.path is s and student.vision_tower is also given"),
        (StudentConfig, {"path": "s", "language_model": "l"}, "student.path is s and student.language_model is also"),
        (TeacherConfig, {"chat_template": "{{ t }}"}, "teacher.chat_template is {{ t }} but teacher.path is not given"),
        (
            TeacherConfig,
            {"lr": 1e-3},
            "teacher.lr is 0.001 but teacher.steps is 0, .*: give teacher.steps, or leave lr",
        ),
        (DataConfig, {"root": "r"}, "data.root is r but data.source is steel, .*: set data.source to voc, llava or"),
        (DataConfig, {"train_split": "a.json"}, "data.train_split is a.json but data.source is steel"),
        (DataConfig, {"test_split": "a.json"}, "data.test_split is a.json but data.source is steel"),
        (DataConfig, {"first_pixel": 0}, "data.first_pixel is 0 but data.source is steel, .*: set data.source to voc"),
        (
            DataConfig,
            {"source": "llava", "first_pixel": 0},
            "data.first_pixel is 0 but data.source is llava, whose boxes are no files of Pascal VOC",
        ),
        (
            DataConfig,
            {"source": "llava", "kinds": ("exists",)},
            r"data.kinds is \('exists',\) but data.source is llava, which brings its own questions",
        ),
        (DataConfig, {"source": "messages", "kinds": ("count",)}, "data.kinds is .* but data.source is messages"),
        (
            SwitchKDConfig,
            {"align": None, "align_weight": 0.5},
            "method.align_weight is 0.5 but method.align is null, .*: set align, or leave align_weight out",
        ),
        (
            SwitchKDConfig,
            {"align": None, "align_options": {"k": 8}},
            "method.align_options is .* but method.align is null",
        ),
        (
            SwitchKDConfig,
            {"switch": None, "switch_weight": 3.0},
            "method.switch_weight is 3.0 but method.switch is null",
        ),
        (
            SwitchKDConfig,
            {"switch": None, "switch_options": {"k": 8}},
            "method.switch_options is .* but method.switch is",
        ),
        (SwitchKDConfig, {"feature_weight": 2.0}, "method.feature_weight is 2.0 but method.feature is null"),
        (
            SwitchKDConfig,
            {"switch": None, "switch_adapter": "linear"},
            "method.switch_adapter is linear but method.switch and method.feature are null",
        ),
    ],
)
def test_refused(section, given, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        section(**given)


@pytest.mark.parametrize(
    ("section", "given"),
    [
        (StudentConfig, {"path": "s", "chat_template": "t"}),
        (StudentConfig, {"vision_tower": "t", "vision_feature_layer": -1, "image_processor": "p"}),
        (StudentConfig, {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "chat_template": "t"}),
        (TeacherConfig, {"path": "t", "chat_template": "t", "steps": 2, "lr": 1e-3}),
        (TeacherConfig, {"made_by": "t.yaml", "chat_template": "t"}),
        (DataConfig, {"kinds": ("exists",), "train_images": 2, "test_images": 2, "image_seed": 3}),
        (DataConfig, {"test_split": None, "test_images": 9}),  # judging turned off for once
        (DataConfig, {"source": "voc", "root": "r", "train_split": "a", "kinds": ("exists",), "first_pixel": 0}),
        (DataConfig, {"source": "llava", "root": "r", "mixture": (VOC,), "kinds": ("exists",), "first_pixel": 0}),
        (DataConfig, {"mixture": (VOC,), "first_pixel": 0}),
        (SwitchKDConfig, {"feature": "cosine", "feature_weight": 2.0, "switch": None, "switch_adapter": "linear"}),
        (SwitchKDConfig, {"align_weight": 0.0, "switch_options": {"temperature": 2.0}, "gradient_checkpointing": True}),
        (SwitchKDConfig, {"align": None, "switch": None, "align_weight": 1.0}),
        (SwitchKDConfig, {"switch": None, "gradient_checkpointing": True}),  # what is learnt does not depend on it
    ],
)
def test_what_is_read_is_taken(section, given):
    config = section(**given)
    assert all(getattr(config, name) == value for name, value in given.items())


def test_as_a_rehearsal_a_section_stays_whole(tmp_path):
    """Rehearsing takes LLaVA data in place of a mixture's boxes."""
    for source in ("llava", "messages", "steel"):
        where = {} if source == "steel" else {"root": "r"}
        data = DataConfig(source, **where, kinds=("exists",), mixture=(VOC,), first_pixel=0)
        assert _tiny_data(data, tmp_path).mixture[0].source == "llava"
    data = DataConfig("voc", "r", kinds=("exists",), first_pixel=0)
    assert (_tiny_data(data, tmp_path).kinds, _tiny_data(data, tmp_path).first_pixel) == (("exists",), 0)
