"""Picture settings of an assembled student: given, beside its tower, or made for it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.models.config import StudentConfig
from switchkd.models.image_processors import image_settings
from switchkd.models.students import build_student

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
# As openai/clip-vit-large-patch14-336 writes them, but for the size.
CLIP_SETTINGS = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 32,
}


@pytest.fixture
def tower(tmp_path):
    folder = tmp_path / "clip"
    CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder


def student_processor(tower, **fields):
    return build_student(StudentConfig(vision_tower=str(tower), **fields))[1]


def wide():
    return Image.fromarray(np.arange(40 * 80 * 3, dtype=np.uint8).reshape(40, 80, 3))


def pixels(image_processor):
    return image_processor(wide(), return_tensors="pt")["pixel_values"]


def test_a_clip_folders_crop_survives(tmp_path, tower):
    (tower / "preprocessor_config.json").write_text(json.dumps(CLIP_SETTINGS))
    processor = student_processor(tower)
    expected = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert image_settings(processor.image_processor) == image_settings(expected)
    processor.save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved").image_processor
    assert torch.equal(pixels(saved), pixels(expected))
    square = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    assert not torch.equal(pixels(saved), pixels(square))


def test_a_siglip_folders_mean_survives(tmp_path):
    SiglipVisionModel(SiglipVisionConfig(**SHAPE, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    own = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], resample=2)
    own.save_pretrained(tmp_path)
    given = student_processor(tmp_path).image_processor
    assert isinstance(given, SiglipImageProcessorPil)
    assert torch.equal(pixels(given), pixels(own))


def test_without_settings_pictures_become_squares(tower):
    settings = image_settings(student_processor(tower).image_processor)
    assert settings["size"] == settings["crop_size"] == {"height": 32, "width": 32}


def test_given_settings_win(tmp_path, tower, processor):
    (tower / "preprocessor_config.json").write_text(json.dumps(CLIP_SETTINGS))
    processor.save_pretrained(tmp_path / "teacher")  # a whole model's: nested in processor_config.json
    given = student_processor(tower, image_processor=str(tmp_path / "teacher")).image_processor
    assert image_settings(given) == image_settings(processor.image_processor)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crop_size": 24}, "crop_size is {'height': 24, 'width': 24} and the vision tower reads 32 x 32 px: give st"),
        ({"do_center_crop": False}, "size is {'shortest_edge': 32} and the vision tower reads 32 x 32 px"),
        ({"do_center_crop": False, "do_resize": False}, "size is not set and the vision tower reads 32 x 32 px"),
    ],
)
def test_pictures_of_another_size_than_the_tower_reads(tower, settings, said):
    (tower / "preprocessor_config.json").write_text(json.dumps({**CLIP_SETTINGS, **settings}))
    with pytest.raises(ValueError, match=f"the image processor's {said}"):
        student_processor(tower)


def test_settings_that_cannot_be_read(tmp_path, tower):
    with pytest.raises(ValueError, match=r"student\.image_processor .*nothing has no preprocessor_config\.json"):
        student_processor(tower, image_processor=str(tmp_path / "nothing"))
    settings = tower / "preprocessor_config.json"
    settings.write_text(json.dumps({"image_processor_type": "ViTImageProcessorFast"}))
    with pytest.raises(ValueError, match=r"student\.vision_tower .* of type 'ViTImageProcessorFast': give student\.im"):
        student_processor(tower)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"student\.vision_tower .*clip has no preprocessor_config\.json that can be"):
        student_processor(tower)
