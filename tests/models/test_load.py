"""Folders that are not whole: each is one line that names the field, the folder and what is wrong with it."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.models import load_llava
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.pair import teacher_processor
from switchkd.models.students import build_processor, build_student, load_vision_tower
from switchkd.models.tiny import tiny_text_config

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}


@pytest.fixture
def folder(tmp_path, student, processor):
    """A whole LLaVA model with its processor; its head is tied, and so not in the file."""
    student.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def language_model(folder, processor, tied=True):
    text = tiny_text_config(processor.tokenizer, hidden=16, layers=1)
    text.tie_word_embeddings = tied
    Qwen2ForCausalLM(text).save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    return folder


def edit(folder, change):
    """Changes the tensors of the folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(*words):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if any(word in key for word in words)]


def cut(word):
    """Half the rows of every tensor whose name holds `word`."""
    return lambda tensors: tensors.update({k: v[: len(v) // 2].clone() for k, v in tensors.items() if word in k})


def refused(error, match, load):
    with pytest.raises(error, match=match) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 900
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without("multi_modal_projector"),
            r"4 tensors of the model are missing from it \(model.multi_modal_projector.linear_1.bias, "
            r"model.multi_modal_projector.linear_1.weight, model.multi_modal_projector.linear_2.bias, \.\.\.\)",
        ),
        (without("layers.1.mlp.down_proj"), r"1 tensors of the model .* \(model.language_model.layers.1.mlp.down_proj"),
        (without("vision_tower"), "tensors of the model are missing from it .model.vision_tower.embeddings"),
        (without("embed_tokens"), "missing from it .*model.language_model.embed_tokens.weight"),
        (
            cut("linear_1.weight"),
            r"1 tensors have another shape \(model.multi_modal_projector.linear_1.weight \(16, 32\), in the model",
        ),
        (lambda t: t.update({"q.lora_A": torch.zeros(2)}), r"1 tensors are not the model's \(q.lora_A\)"),
        (
            lambda t: (without("linear_2")(t), t.update(a=torch.zeros(2), b=torch.zeros(2))),
            r"2 tensors of the model are missing .*; 2 tensors are not the model's \(a, b\)",
        ),
    ],
)
def test_tensors_of_a_whole_model(folder, change, said):
    edit(folder, change)
    name = f"^{re.escape(str(folder))} holds other weights than the LLaVA model of its config.json has: .*"
    refused(ValueError, name + said, lambda: load_llava(folder))
    refused(ValueError, "^student.path .* holds other weights", lambda: build_student(StudentConfig(path=str(folder))))


def test_what_may_be_absent(folder, student, tmp_path):
    assert not [key for key in load_file(folder / "model.safetensors") if "lm_head" in key]
    load_llava(folder)
    # a tied head that is saved all the same
    head = student.lm_head.weight.detach().clone()
    edit(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": head}))
    load_llava(folder)
    # an older file's buffers
    edit(folder, lambda t: t.update({"vision_tower.vision_model.embeddings.position_ids": torch.arange(16)[None]}))
    edit(folder, lambda t: t.update({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_llava(folder)
    # the pooling head of a SigLIP tower, which a LLaVA model does not read
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = True
    (folder / "config.json").write_text(json.dumps(config))
    load_llava(folder)


def test_a_head_of_its_own_is_not_absent(folder):
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    refused(ValueError, r"1 tensors of the model are missing from it \(lm_head.weight\)", lambda: load_llava(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("fc1"), r"4 tensors of the model are missing from it \(encoder.layers.0.mlp.fc1.bias"),
        (cut("position_embedding"), "1 tensors have another shape .embeddings.position_embedding.weight .8, 16., in"),
        (lambda t: t.update(reader=torch.zeros(2)), r"1 tensors are not the model's \(reader\)"),
    ],
)
def test_tensors_of_a_vision_tower(tmp_path, change, said):
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path)
    edit(tmp_path, change)
    said = "^student.vision_tower .* holds other weights than the vision tower of .*" + said
    refused(ValueError, said, lambda: load_vision_tower(str(tmp_path)))


def test_a_vision_tower_without_its_pooling_head(tmp_path, caplog):
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
    tower.save_pretrained(tmp_path)
    edit(tmp_path, without("head."))
    pixels = torch.randn(1, 3, 32, 32)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        loaded = load_vision_tower(str(tmp_path)).eval()
        assert torch.equal(loaded(pixels).last_hidden_state, tower.eval()(pixels).last_hidden_state)
    assert not caplog.records


def test_a_tower_missing_from_a_whole_model(tmp_path):
    text = CLIPTextConfig(**SHAPE, vocab_size=9)
    CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION))).save_pretrained(tmp_path)
    load_vision_tower(str(tmp_path))
    edit(tmp_path, without("vision_model.encoder"))
    refused(ValueError, "32 tensors of the model are missing", lambda: load_vision_tower(str(tmp_path)))


@pytest.mark.parametrize(
    ("tied", "change", "said"),
    [
        (True, without("q_proj"), r"2 tensors of the model are missing from it \(model.layers.0.self_attn.q_proj.bias"),
        (False, without("lm_head"), r"1 tensors of the model are missing from it \(lm_head.weight\)"),
        (True, cut("embed_tokens"), r"1 tensors have another shape \(model.embed_tokens.weight"),
        (True, lambda t: t.update({"score.weight": torch.zeros(2)}), r"1 tensors are not the model's \(score.weight\)"),
    ],
)
def test_tensors_of_a_language_model(tmp_path, processor, tied, change, said):
    language_model(tmp_path, processor, tied)
    build_student(StudentConfig(language_model=str(tmp_path)))
    edit(tmp_path, change)
    said = "^student.language_model .* holds other weights than the language model of .*" + said
    refused(ValueError, said, lambda: build_student(StudentConfig(language_model=str(tmp_path))))


@pytest.mark.parametrize("build", [build_student, build_processor])
@pytest.mark.parametrize("field", ["path", "vision_tower", "language_model", "image_processor"])
@pytest.mark.parametrize("name", ["someone/model-that-is-nowhere", "runs/tinyllava/3b/student"])
def test_what_is_nowhere_is_one_line_that_names_the_field(field, name, build):
    said = refused(
        OSError if field != "image_processor" else ValueError, name, lambda: build(StudentConfig(**{field: name}))
    )
    assert said.startswith(f"student.{field} {name} ")


@pytest.mark.parametrize("name", ["someone/model-that-is-nowhere", "runs/tinyllava/3b/student"])
def test_a_teacher_that_is_nowhere(name):
    said = rf"^teacher.path {name} is no folder here, .*: give the folder of a saved .*hf download {name}"
    refused(FileNotFoundError, said, lambda: load_llava(name, field="teacher.path"))
    refused(FileNotFoundError, said, lambda: teacher_processor(TeacherConfig(path=name)))
    assert teacher_processor(TeacherConfig(path=name), local_files_only=True) is None


def halve(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:200])


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def remove(file):
    return lambda folder: (folder / file).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (halve("model.safetensors"), r"cannot be read as a LLaVA model \(SafetensorError"),
        (write("model.safetensors", ""), r"cannot be read as a LLaVA model \(SafetensorError"),
        (remove("model.safetensors"), "no file named model.safetensors"),
        (halve("config.json"), "not a valid JSON file"),
        (write("config.json", "[]"), r"cannot be read as a LLaVA model \((AttributeError|TypeError)"),
        (write("config.json", "{}"), "holds a model of type None, not 'llava'"),
        (write("tokenizer.json", '{"model":'), "cannot be read as a processor .JSONDecodeError"),
        (remove("tokenizer.json"), "cannot be read as a processor .ValueError"),
        (halve("processor_config.json"), "not a valid JSON file"),
        (remove("processor_config.json"), "Can't load image processor for"),
        (write("processor_config.json", '{"processor_class": "Qwen2VLProcessor"}'), "processor"),
    ],
)
def test_damaged_files(folder, damage, said):
    damage(folder)
    said = f"^teacher.path {re.escape(str(folder))}.*{said}"
    refused((ValueError, OSError), said, lambda: load_llava(folder, field="teacher.path"))


def test_a_missing_shard(folder, student):
    (folder / "model.safetensors").unlink()
    student.save_pretrained(folder, max_shard_size="50KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    refused(OSError, "model-00002-of-", lambda: load_llava(folder, field="teacher.path"))


def test_the_processor_of_another_model(folder):
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "LlavaNextProcessor"}))
    said = "^teacher.path .* has a processor of class LlavaNextProcessor, not LlavaProcessor: save the one that belongs"
    refused(ValueError, said, lambda: teacher_processor(TeacherConfig(path=str(folder))))
    refused(ValueError, said, lambda: load_llava(folder, field="teacher.path"))


def test_no_code_of_a_folder_is_run(tmp_path, folder, processor):
    for name in ("lm", "llava"):
        where = tmp_path / name
        if name == "lm":
            language_model(where, processor)
        config = json.loads((where / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (where / "config.json").write_text(json.dumps(config))
        (where / "own.py").write_text("raise SystemExit('run')")
    refused(
        ValueError,
        "^student.language_model ",
        lambda: build_student(StudentConfig(language_model=str(tmp_path / "lm"))),
    )
    refused(ValueError, "type 'own', not 'llava'", lambda: load_llava(folder))


def test_a_language_model_of_another_kind(tmp_path):
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(tmp_path)
    student = StudentConfig(language_model=str(tmp_path))
    refused((ValueError, OSError), "^student.language_model .*cannot be read as a ", lambda: build_student(student))


def test_weights_are_loaded_as_they_are(folder, student):
    loaded, _ = load_llava(folder, torch.bfloat16)
    assert isinstance(loaded, LlavaForConditionalGeneration)
    own = student.state_dict()
    assert all(torch.equal(value, own[key].to(value.dtype)) for key, value in loaded.state_dict().items())
