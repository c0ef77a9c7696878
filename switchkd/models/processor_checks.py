"""Whether a model and its processor belong together: what judging would find after training, found before it."""

from __future__ import annotations

from contextlib import suppress

from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from switchkd.models.pathway import pathway_of
from switchkd.models.templates import PROBE, QUESTION, render, turn_end
from switchkd.models.towers import tower_kind


def check_processor(model: LlavaForConditionalGeneration, processor: LlavaProcessor, whose: str) -> None:
    """ValueError unless `model` can answer a question about a picture as `processor` encodes it.

    whose: "teacher" or "student", the section of the configuration that named them. One blank picture, wider than high,
    is encoded with a question, and set beside what the model reads: the template, the image token, the rows of the
    vocabulary, what ends an answer, the size of the picture and its number of tokens. Each error names both values.
    """
    text = render(processor.tokenizer, processor.chat_template, PROBE[:1]) if processor.chat_template else ""
    if text.count(processor.image_token) != 1 or QUESTION not in text:
        found = "has no chat template"
        if processor.chat_template:
            found = f"writes an image and its question as {text!r} by its chat template"
        raise ValueError(
            f"the {whose}'s processor {found}, and every question is asked by it, as one {processor.image_token} and "
            f"the text: give {whose}.chat_template"
        )
    _check_tokens(model, processor, whose)
    _check_ends(model, processor, whose)
    _check_picture(model, processor, whose, text)


def _check_tokens(model: LlavaForConditionalGeneration, processor: LlavaProcessor, whose: str) -> None:
    vocabulary = processor.tokenizer.get_vocab()
    image_token = processor.image_token
    if vocabulary.get(image_token) != model.config.image_token_id:
        raise ValueError(
            f"the {whose}'s image token {image_token} has id {vocabulary.get(image_token)} in its tokenizer and "
            f"{model.config.image_token_id} in its model: set image_token_index in config.json to the tokenizer's"
        )
    rows = model.get_input_embeddings().num_embeddings
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= rows:
        raise ValueError(
            f"the {whose}'s tokenizer gives {token!r} the id {last} and its model has {rows} embedding rows: save the "
            "model with the tokenizer it was trained with, or resize its embeddings (resize_token_embeddings)"
        )


def _check_ends(model: LlavaForConditionalGeneration, processor: LlavaProcessor, whose: str) -> None:
    """An answer ends at the tokens of the generation config and at the tokenizer's end token."""
    tokenizer = processor.tokenizer
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    turn = turn_end(tokenizer, processor.chat_template)
    if not ends or (turn is not None and turn not in ends):
        written = "" if turn is None else f", and its chat template ends an answer with {turn}"
        raise ValueError(
            f"the {whose}'s answers end at the tokens {sorted(ends) or 'none'} (eos_token_id of its "
            f"generation_config.json, eos_token of its tokenizer){written}: set eos_token_id to what ends a turn, or "
            "no answer would end"
        )


def _check_picture(model: LlavaForConditionalGeneration, processor: LlavaProcessor, whose: str, text: str) -> None:
    vision = model.config.vision_config
    wide = Image.new("RGB", (3 * vision.image_size // 2, vision.image_size))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"]
    if tuple(pixels.shape[1:]) != (vision.num_channels, vision.image_size, vision.image_size):
        raise ValueError(
            f"the {whose}'s processor makes a picture of {tuple(pixels.shape[1:])} and its vision tower reads "
            f"{(vision.num_channels, vision.image_size, vision.image_size)}: correct size and crop_size in its "
            "processor_config.json or preprocessor_config.json"
        )
    wanted, written = pathway_of(model).visual_token_count, "no"
    with suppress(TypeError, ZeroDivisionError):  # it divides by settings that are None, or 0
        written = processor(text=[text], images=[wide])["input_ids"][0].count(processor.image_token_id)
    if written != wanted:
        must = {
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(tower_kind(vision).class_token),
            "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        }
        other = ", ".join(
            f"{name} is {getattr(processor, name)} and must be {value}"
            for name, value in must.items()
            if getattr(processor, name) != value
        )
        raise ValueError(
            f"the {whose}'s processor writes {written} image tokens for a picture and its model reads {wanted}: "
            f"correct processor_config.json, where {other}"
        )
