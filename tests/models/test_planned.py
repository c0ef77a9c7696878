"""Configurations without weights: well-known parts by their published sizes, and students as they are built."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionModel,
)

from switchkd.models import load_llava
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.planned import (
    KNOWN,
    known_names,
    known_tokens,
    planned_part,
    student_config,
    teacher_config,
)
from switchkd.models.students import build_processor, build_student, load_vision_tower
from switchkd.models.tiny import LLAMA_CHAT_TEMPLATE, TEACHER, tiny_llama_tokenizer, tiny_vision_config

ROOT = Path(__file__).parents[2]
# Parameters as the models' pages and safetensors headers give them, tied heads counted once; a tower with its pooling
# head and last norm.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip2-so400m-patch14-384": 428_225_600,
    "google/siglip-base-patch16-224": 92_884_224,
    "google/siglip-base-patch16-384": 93_176_064,
    "openai/clip-vit-large-patch14": 303_179_776,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
}


def parameters(config):
    if config.model_type == "llava":
        kind = LlavaForConditionalGeneration._from_config
    else:
        kind = (AutoModel if hasattr(config, "image_size") else AutoModelForCausalLM).from_config
    with torch.device("meta"):
        model = kind(config)
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_part_has_the_published_parameters(name):
    assert parameters(planned_part(name)) == PUBLISHED[name]


def test_every_known_part_is_held_to_a_published_number():
    assert {name.removesuffix("-Instruct") for name in known_names()} == PUBLISHED.keys()
    for name in known_names():
        if name.endswith("-Instruct"):
            assert parameters(planned_part(name)) == PUBLISHED[name.removesuffix("-Instruct")]
    configs = {name: planned_part(name) for name in known_names()}
    language_models = {n for n, c in configs.items() if c.model_type != "llava" and not hasattr(c, "image_size")}
    assert known_tokens().keys() == language_models
    for name, tokens in known_tokens().items():
        assert tokens <= configs[name].vocab_size


def test_known_parts_are_package_data():
    globs = json.loads(re.search(r"package-data]\nswitchkd = (.*)", (ROOT / "pyproject.toml").read_text())[1])
    packed = {file for glob in globs for file in (ROOT / "switchkd").glob(glob)}
    assert {file for file in KNOWN.rglob("*") if file.is_file()} <= packed


def test_a_real_run_reads_no_known_part(monkeypatch):
    """Neither its code asks for them, nor is a name taken from them where the Hub is out of reach."""
    readers = [
        str(file.relative_to(ROOT))
        for file in ROOT.glob("switchkd/**/*.py")
        if "models.planned" in (text := file.read_text()) or '"known"' in text
    ]
    assert sorted(readers) == [
        "switchkd/models/planned.py",
        "switchkd/plan/planner.py",
        "switchkd/tasks/vlm_rehearsal.py",
    ]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    parts = StudentConfig(vision_tower="google/siglip-base-patch16-384", language_model="Qwen/Qwen2.5-0.5B")
    whole = StudentConfig(path="llava-hf/llava-1.5-7b-hf")
    for config in (parts, whole):
        assert student_config(config).model_type == "llava"
        for build in (build_student, build_processor):
            with pytest.raises(FileNotFoundError, match=r"student\.\w+ \S+ is no folder here, and not on"):
                build(config)
    with pytest.raises(FileNotFoundError, match="siglip-base-patch16-384 is no folder here"):
        load_vision_tower(parts.vision_tower)
    with pytest.raises(FileNotFoundError, match=r"llava-1\.5-7b-hf is no folder here"):
        load_llava(whole.path)


def test_a_folder_goes_before_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "Qwen/Qwen2.5-0.5B"
    Qwen2Config(vocab_size=77, hidden_size=16, num_attention_heads=2).save_pretrained(name)
    assert planned_part(name).vocab_size == 77
    assert student_config(StudentConfig(language_model=name)).image_token_id == 77  # no tokenizer: one row more
    with pytest.raises(ValueError, match="holds a model of type 'qwen2', not 'llava'"):
        teacher_config(TeacherConfig(path=name))


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json: give the folder of a saved model, or a Hub name"):
        planned_part(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="gone does not exist: give the folder of a saved LLaVA model"):
        teacher_config(TeacherConfig(path=str(tmp_path / "gone")))


@pytest.mark.parametrize(
    ("text", "image", "rows", "tied"),
    [
        ("Qwen/Qwen2.5-0.5B", 151_665, 151_936, True),
        ("Qwen/Qwen2.5-7B-Instruct", 151_665, 152_064, False),
        ("Qwen/Qwen3-0.6B", 151_669, 151_936, True),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 32_000, 32_001, False),
    ],
)
def test_the_rows_of_the_vocabulary(text, image, rows, tied):
    config = student_config(StudentConfig(vision_tower="openai/clip-vit-large-patch14", language_model=text))
    assert (config.image_token_id, config.text_config.vocab_size) == (image, rows)
    assert config.tie_word_embeddings is tied
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


def test_a_whole_student_on_the_meta_device():
    parts = ("google/siglip-so400m-patch14-384", "Qwen/Qwen2.5-0.5B")
    config = student_config(StudentConfig(vision_tower=parts[0], language_model=parts[1], vision_feature_layer=-3))
    projector = (1152 + 1) * 896 + (896 + 1) * 896
    assert parameters(config) == sum(PUBLISHED[part] for part in parts) + projector
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-3, "full")


def test_the_configuration_is_that_of_the_student_that_is_built(tmp_path):
    tokenizer = tiny_llama_tokenizer()
    tokenizer.save_pretrained(tmp_path / "lm")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(text).save_pretrained(tmp_path / "lm")
    SiglipVisionModel(tiny_vision_config(16, 2)).save_pretrained(tmp_path / "tower")
    parts = {"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "lm")}
    for fields in ({}, parts, {**parts, "vision_feature_layer": -1, "chat_template": LLAMA_CHAT_TEMPLATE}):
        config = StudentConfig(**fields)
        model, processor = build_student(config)
        model.save_pretrained(tmp_path / "whole")
        processor.save_pretrained(tmp_path / "whole")
        expected = {name: weight.shape for name, weight in model.named_parameters()}
        for planned in (student_config(config), student_config(StudentConfig(path=str(tmp_path / "whole")))):
            with torch.device("meta"):
                shapes = LlavaForConditionalGeneration(planned).named_parameters()
                assert {name: weight.shape for name, weight in shapes} == expected
            for field in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy"):
                assert getattr(planned, field) == getattr(model.config, field), field


def test_the_teachers():
    assert teacher_config(TeacherConfig()).to_dict() == teacher_config(TeacherConfig(path=str(TEACHER))).to_dict()
    assert teacher_config(TeacherConfig(path="llava-hf/llava-1.5-7b-hf")).text_config.vocab_size == 32_064
    with pytest.raises(ValueError, match=r"Qwen2\.5-3B holds a model of type 'qwen2', not 'llava'.*switchkd convert"):
        teacher_config(TeacherConfig(path="Qwen/Qwen2.5-3B"))
