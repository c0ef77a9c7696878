"""A model and a processor that do not belong together, found before any training."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
)

from switchkd.models import assemble_llava, load_llava
from switchkd.models.processor_checks import check_processor
from switchkd.models.tiny import CHAT_TEMPLATE, TEACHER, tiny_llama_tokenizer, tiny_processor, tiny_text_config

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_IMAGE = "{% for m in messages %}{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def own():
    """A processor to change."""
    return tiny_processor(32, 8)


@pytest.fixture
def pair(student, own):
    student.generation_config.eos_token_id = own.tokenizer.eos_token_id
    return student, own


def clip(**options):
    tokenizer = tiny_llama_tokenizer()
    language_model = Qwen2ForCausalLM(tiny_text_config(tokenizer, hidden=32, layers=1))
    tower = CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8))
    return assemble_llava(tower, language_model, tokenizer, **options)


def set_all(**settings):
    return lambda model, processor: [setattr(processor, name, value) for name, value in settings.items()]


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_pairs_that_belong_together(pair, whose):
    check_processor(*pair, whose)
    check_processor(*load_llava(TEACHER), whose)
    for strategy in ("default", "full"):
        check_processor(*clip(vision_feature_select_strategy=strategy), whose)
    crop = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    check_processor(*clip(image_processor=crop), whose)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            set_all(patch_size=None),
            "processor writes no image tokens for a picture and its model reads 16: correct processor_config.json, "
            "where patch_size is None and must be 8$",
        ),
        (
            set_all(patch_size=16),
            "processor writes 4 image tokens .* reads 16: .* where patch_size is 16 and must be 8$",
        ),
        (set_all(patch_size=0), "processor writes no image tokens .* where patch_size is 0 and must be 8$"),
        (
            set_all(num_additional_image_tokens=1),
            "processor writes 17 image tokens .* reads 16: .* where num_additional_image_tokens is 1 and must be 0$",
        ),
        (
            set_all(vision_feature_select_strategy="default"),
            "processor writes 15 image tokens .* reads 16: .*select_strategy is default and must be full",
        ),
        (
            lambda model, processor: setattr(model.config, "vision_feature_select_strategy", "default"),
            "processor writes 16 image tokens .* reads 15: .*select_strategy is full and must be default",
        ),
    ],
)
def test_other_numbers_of_image_tokens(pair, change, said):
    change(*pair)
    with pytest.raises(ValueError, match="^the teacher's " + said):
        check_processor(*pair, "teacher")


def test_a_class_token_that_the_processor_does_not_count():
    model, processor = clip()
    processor.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match="writes 15 image tokens .* reads 16: .* num_additional_image_tokens is 0 and"):
        check_processor(model, processor, "student")


@pytest.mark.parametrize(
    ("image_processor", "made"),
    [
        (SiglipImageProcessorPil(size={"height": 48, "width": 48}), r"\(3, 48, 48\)"),
        (SiglipImageProcessorPil(do_resize=False), r"\(3, 32, 48\)"),
        (CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False), r"\(3, 32, 48\)"),
    ],
)
def test_pictures_of_another_size(pair, image_processor, made):
    model, processor = pair
    processor.image_processor = image_processor
    said = rf"^the student's processor makes a picture of {made} and its vision tower reads \(3, 32, 32\): correct size"
    with pytest.raises(ValueError, match=said):
        check_processor(model, processor, "student")


def other_image_token(model, processor):
    model.config.image_token_id = 7


def unknown_image_token(model, processor):
    processor.image_token = "<picture>"
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", "<picture>")


def more_tokens(model, processor):
    processor.tokenizer.add_tokens([AddedToken("mot-un"), AddedToken("mot-deux")])


def fewer_rows(model, processor):
    model.resize_token_embeddings(40)


def no_end(model, processor):
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = None


def another_end(model, processor):
    model.generation_config.eos_token_id = [0]
    processor.tokenizer.eos_token = "<|endoftext|>"


def another_template(model, processor):
    """Its turns end in a special token that the model does not stop at."""
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_all(chat_template=None), "the teacher's processor has no chat template, .*: give teacher.chat_template$"),
        (set_all(chat_template=NO_IMAGE), "the teacher's processor writes an image and its question as '.*one <image>"),
        (set_all(chat_template="{{ no such thing"), "processor writes an image and its question as '' by its chat"),
        (other_image_token, "image token <image> has id 3 in its tokenizer and 7 in its model: set image_token_index"),
        (unknown_image_token, "image token <picture> has id None in its tokenizer and 3 in its model"),
        (more_tokens, "tokenizer gives 'mot-deux' the id 414 and its model has 413 embedding rows"),
        (fewer_rows, "tokenizer gives .* the id 412 and its model has 40 embedding rows: save the model with"),
        (no_end, "answers end at the tokens none .*: set eos_token_id to what ends a turn"),
        (another_end, r"answers end at the tokens \[0\] .* its chat template ends an answer with 2: set eos_token_id"),
        (another_template, r"answers end at the tokens \[2\] .* its chat template ends an answer with 0: set"),
    ],
)
def test_what_only_judging_uses(pair, change, said):
    change(*pair)
    with pytest.raises(ValueError, match=said) as caught:
        check_processor(*pair, "teacher")
    assert len(str(caught.value).splitlines()) == 1
