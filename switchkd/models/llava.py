"""Stock LLaVA models: load, assemble, freeze, compare vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
)

IMAGE_TOKEN = "<image>"
PARTS = {
    "vision_tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language_model": "model.language_model",
}


def load_llava(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA model and its processor from a folder or a Hub name; safetensors only, no remote code.

    Raises FileNotFoundError for a folder without config.json and ValueError for a model of another class.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of a saved LLaVA model, or a Hub name")
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith(".")):
        raise FileNotFoundError(f"{folder} does not exist: give the folder of a saved LLaVA model, or a Hub name")
    config, _ = LlavaConfig.get_config_dict(path)
    if config.get("model_type") != "llava":
        raise ValueError(
            f"{path} holds a model of type {config.get('model_type')!r}, not 'llava': students and teachers are "
            "LlavaForConditionalGeneration; assemble one from a vision tower and a language model"
        )
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, use_safetensors=True)
    return model, AutoProcessor.from_pretrained(path)


def assemble_llava(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_feature_layer: int = -2,
    chat_template: str | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA model from a vision tower and a causal language model, with a new two-layer projector.

    vision_tower: SiglipVisionModel or CLIPVisionModel; a class token is dropped. language_model: any causal language
    model with `lm_head`. tokenizer: the language model's; `<image>` is added where it is missing, and the embedding
    rows grow only when they do not hold it already. chat_template: in place of the tokenizer's own.
    The projector's start follows torch's seed. The weights are moved, not copied.
    """
    kind = vision_tower.config.model_type
    if kind not in ("siglip_vision_model", "clip_vision_model"):
        raise ValueError(f"vision tower of type {kind!r}: known are siglip_vision_model and clip_vision_model")
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template: pass chat_template")
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.image_token = IMAGE_TOKEN
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
    has_class_token = kind == "clip_vision_model"
    strategy = "default" if has_class_token else "full"
    vision, text = vision_tower.config, language_model.config
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    size = {"height": vision.image_size, "width": vision.image_size}
    image_processor = (
        CLIPImageProcessorPil(size=size, crop_size=size) if has_class_token else SiglipImageProcessorPil(size=size)
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )
    return model, processor


def freeze(model: LlavaForConditionalGeneration, parts: Sequence[str] = ()) -> None:
    """Freezes the named parts ("vision_tower", "projector", "language_model"; with it its head) and trains the rest.

    The tower's parameters that no output depends on (layers past `vision_feature_layer`, the last norm, the pooling
    head) are always frozen: DDP waits for their gradient and weight decay would move them.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"freeze: {unknown} is not a part of the model; known are {', '.join(PARTS)}")
    model.requires_grad_(True)
    for part in parts:
        model.get_submodule(PARTS[part]).requires_grad_(False)
        if part == "language_model":
            model.lm_head.requires_grad_(False)
    for module in _unused(model):
        module.requires_grad_(False)


def _unused(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    tower = model.model.vision_tower
    layers = tower.encoder.layers
    read = model.config.vision_feature_layer
    read = [read] if isinstance(read, int) else list(read)
    last = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in read)
    unused: list[nn.Module] = [*layers[last:], tower.post_layernorm]
    if getattr(tower, "use_head", False):
        unused.append(tower.head)
    return unused


def shared_vocab(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of leading vocabulary rows that mean the same token to student and teacher.

    Token-to-id maps are compared, not sizes: Qwen2.5 models share 151,665 tokens while their heads have 151,936 or
    152,064 rows. `<image>` names no word and stands for itself: tokens after the shared rows are allowed only if they
    are it. Raises ValueError naming both tokenizers and the first token on which they differ.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    names = f"student {student_tokenizer.name_or_path!r} and teacher {teacher_tokenizer.name_or_path!r}"
    image_ids = [vocab.pop(IMAGE_TOKEN, None) for vocab in (student, teacher)]
    if student != teacher:
        token = min(
            (token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token)),
            key=lambda token: min(student.get(token, 1 << 60), teacher.get(token, 1 << 60)),
        )
        raise ValueError(
            f"the tokenizers of {names} differ: {token!r} has id {student.get(token)} in the student and "
            f"{teacher.get(token)} in the teacher; distil between models of one vocabulary"
        )
    if image_ids[0] != image_ids[1]:
        raise ValueError(
            f"<image> has id {image_ids[0]} in the student and {image_ids[1]} in the teacher ({names}): add it to both "
            "tokenizers in the same way, for one encoded sample is read by both"
        )
    return max(student.values()) + 1
