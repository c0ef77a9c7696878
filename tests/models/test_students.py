"""The student that a configuration names, from tiny saved parts."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    OPTConfig,
    Qwen2ForCausalLM,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.models import students
from switchkd.models.config import StudentConfig
from switchkd.models.students import build_processor, build_student, load_vision_tower
from switchkd.models.tiny import CHAT_TEMPLATE, STUDENT_SHAPE, tiny_text_config, tiny_tokenizer, tiny_vision_config

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}


@pytest.fixture
def tower(tmp_path, monkeypatch):
    """A random tower of 32 pixels in the place of the package's own."""
    torch.manual_seed(1)
    model = SiglipVisionModel(tiny_vision_config(32, 2, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path / "tower")
    monkeypatch.setattr(students, "VISION_TOWER", tmp_path / "tower")
    return model


@pytest.fixture
def language_model(tmp_path):
    """The folder of a language model with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "lm")
    model = Qwen2ForCausalLM(tiny_text_config(tokenizer, hidden=48, layers=1))
    model.save_pretrained(tmp_path / "lm")
    return model


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def build(seed=0, **fields):
    torch.manual_seed(seed)
    return build_student(StudentConfig(**fields))


def test_left_out_it_is_the_tiny_one(tower):
    model, processor = build()
    assert same_weights(model.model.vision_tower, tower)
    text = model.config.text_config
    assert (text.hidden_size, text.num_hidden_layers) == (STUDENT_SHAPE["hidden"], STUDENT_SHAPE["layers"])
    assert processor.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert processor.chat_template == CHAT_TEMPLATE


def test_the_layer_that_the_projector_reads(tmp_path, tower):
    own, other = {}, {"vision_tower": str(tmp_path / "tower")}
    for fields, layer in ((own, -1), (other, -2), ({**own, "vision_feature_layer": -2}, -2)):
        assert build(**fields)[0].config.vision_feature_layer == layer
    assert build(**other, vision_feature_layer=-1)[0].config.vision_feature_layer == -1


def test_the_same_seed_is_the_same_student(tower):
    first, again, other = build(3)[0], build(3)[0], build(4)[0]
    assert same_weights(first, again)
    assert not same_weights(first.model.language_model, other.model.language_model)
    assert not same_weights(first.model.multi_modal_projector, other.model.multi_modal_projector)


def test_from_two_parts(tmp_path, tower, language_model):
    model, processor = build(vision_tower=str(tmp_path / "tower"), language_model=str(tmp_path / "lm"))
    assert same_weights(model.model.vision_tower, tower)
    assert same_weights(model.model.language_model, language_model.model)
    assert processor.chat_template == AutoTokenizer.from_pretrained(tmp_path / "lm").chat_template


def test_the_chat_template_is_passed_on(tmp_path, tower, language_model):
    own = CHAT_TEMPLATE + "\n"
    for part in (None, str(tmp_path / "lm")):
        assert build(language_model=part, chat_template=own)[1].chat_template == own


def test_a_whole_one_by_path(tmp_path, student, processor):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = build(path=str(tmp_path))
    assert same_weights(model, student)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_whole_one_takes_another_template_and_stops_at_its_turns(tmp_path, student, processor):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    model, loaded = build(path=str(tmp_path), chat_template=other)
    assert loaded.chat_template == loaded.tokenizer.chat_template == other
    built = build_processor(StudentConfig(path=str(tmp_path), chat_template=other))
    assert built.chat_template == built.tokenizer.chat_template == other
    ends = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends
    loaded.save_pretrained(tmp_path)
    assert build(path=str(tmp_path))[1].chat_template == other
    for build_it in (build_student, build_processor):
        with pytest.raises(ValueError, match="chat_template does not write an image and its question"):
            build_it(StudentConfig(path=str(tmp_path), chat_template="{{ messages[0]['role'] }}"))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=1, n_head=2),
        OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16),
        BertConfig(**SHAPE, is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
def test_language_models_that_the_stock_class_does_not_take(tmp_path, tower, config):
    tokenizer = tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=f"a language model of type '{config.model_type}' cannot stand in Llava.*Qwen"):
        build(language_model=str(tmp_path / "lm"))


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_that_the_tower_does_not_have(tower, layer):
    said = f"vision_feature_layer is {layer} and the vision tower has 2 layers: give one of -3 to 2"
    with pytest.raises(ValueError, match=said):
        build(vision_feature_layer=layer)
    for within in (-3, 2):
        assert build(vision_feature_layer=within)[0].config.vision_feature_layer == within


def test_half_precision_parts_give_a_float32_student(tmp_path, tower, language_model):
    tower.half().save_pretrained(tmp_path / "tower")
    language_model.bfloat16().save_pretrained(tmp_path / "lm")
    model, _ = build(language_model=str(tmp_path / "lm"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.dtype == model.model.vision_tower.dtype == torch.float32
    assert same_weights(model.model.vision_tower, tower.float())
    model.save_pretrained(tmp_path / "whole")
    assert '"dtype": "float32"' in (tmp_path / "whole/config.json").read_text()
    assert "float16" not in (tmp_path / "whole/config.json").read_text()


@pytest.mark.parametrize(
    "whole",
    [
        SiglipModel(
            SiglipConfig(
                text_config=SiglipTextConfig(**SHAPE, vocab_size=9), vision_config=SiglipVisionConfig(**VISION)
            )
        ),
        CLIPModel(
            CLIPConfig(text_config=CLIPTextConfig(**SHAPE, vocab_size=9), vision_config=CLIPVisionConfig(**VISION))
        ),
    ],
    ids=lambda model: model.config.model_type,
)
def test_the_tower_inside_a_whole_model(tmp_path, whole):
    whole.save_pretrained(tmp_path)
    tower = load_vision_tower(str(tmp_path))
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = whole.eval().vision_model(pixels).last_hidden_state
        assert torch.equal(tower.eval()(pixels).last_hidden_state, expected)


def test_a_tower_of_another_type(tmp_path):
    BertConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student\.vision_tower .* is of type 'bert': known are siglip_vision_model"):
        load_vision_tower(str(tmp_path))


def test_packed_patches_are_refused(tmp_path):
    Siglip2Config(vision_config=SHAPE, text_config={**SHAPE, "vocab_size": 9}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student\.vision_tower .* 'siglip2_vision_model', the NaFlex kind, .*take a"):
        load_vision_tower(str(tmp_path))
