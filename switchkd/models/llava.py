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

from switchkd.models.tiny import CHAT_TEMPLATE

IMAGE_TOKEN = "<image>"
PARTS = {
    "vision_tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language_model": "model.language_model",
}
QUESTION, ANSWER = "Is there a scratch?", "A long one."
PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]
# What an image processor does to a picture, and the settings of each step.
IMAGE_STEPS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_pad": (),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
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
    rows grow only when they do not hold it already.
    chat_template: left out, the tokenizer's own where it takes images; where it takes text alone and its turns are
    ChatML's (Qwen2.5), or it has none but has ChatML's tokens, ChatML with images and without a default system prompt.
    The projector's start follows torch's seed. All weights are float32, and what is float32 already is shared with
    the two models given, not copied: use those no further. `generate` stops at the template's end of turn too.
    Raises ValueError for another vision tower, and where no template takes images.
    """
    kind = vision_tower.config.model_type
    if kind not in ("siglip_vision_model", "clip_vision_model"):
        raise ValueError(f"vision tower of type {kind!r}: known are siglip_vision_model and clip_vision_model")
    template = _image_template(tokenizer, chat_template)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
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
    # With keep_vars the parameters themselves change hands, so that tied ones stay tied. The model's own random ones
    # are made first all the same: on the meta device its rotary buffers would have no values.
    for part, given in (
        (model.model.vision_tower, vision_tower),
        (model.model.language_model, language_model.get_decoder()),
        (model.lm_head, language_model.get_output_embeddings()),
    ):
        part.load_state_dict(given.state_dict(keep_vars=True), assign=True)
    model.float()
    ends = _end_tokens(language_model, tokenizer, template)
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
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


def _image_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    template = chat_template or tokenizer.chat_template
    text = _render(tokenizer, template, PROBE) if template else ""
    if text.count(IMAGE_TOKEN) == 1 and QUESTION in text and ANSWER in text:
        return template
    if chat_template is None and _is_chatml(tokenizer):
        return CHAT_TEMPLATE
    name = f"tokenizer {tokenizer.name_or_path!r}"
    found = f"{name} has no chat template"
    if template:
        whose = "chat_template" if chat_template else f"the chat template of {name}"
        found = f"{whose} does not write an image and its question as one {IMAGE_TOKEN} and the text"
    raise ValueError(
        f"{found}: pass a chat_template (student.chat_template) that takes messages whose content is a list of "
        '{"type": "image"} and {"type": "text", "text": ...}'
    )


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ChatML writes text as the tokenizer's own template does. The probe brings a system message, so that the
    default one that some templates write without it does not matter."""
    if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        return False
    if tokenizer.chat_template is None:
        return True
    turns = [("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER), ("user", "And now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    own, chatml = (_render(tokenizer, template, messages) for template in (tokenizer.chat_template, CHAT_TEMPLATE))
    return own == chatml


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict]) -> str:
    """The messages as text; empty where the template cannot take them."""
    prompt = messages[-1]["role"] == "user"
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template is a foreign program: it may raise whatever it likes
        return ""


def _end_tokens(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """What ends an answer: the language model's and the tokenizer's end tokens, and the template's end of turn, which
    base models (Qwen2.5: eos <|endoftext|>, turns end in <|im_end|>) do not count among them."""
    own = language_model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    after = _render(tokenizer, template, PROBE).rpartition(ANSWER)[2]
    special = [
        token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in tokenizer.all_special_ids
    ]
    return sorted({*ends, *special[:1]} - {None})


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


def same_inputs(student_processor: LlavaProcessor, teacher_processor: LlavaProcessor) -> None:
    """Checks that both processors make the same picture and the same text of one conversation.

    One encoding, the student's, is read by student and teacher. Raises ValueError naming the first difference and
    both values: size, resampling, crop, padding, rescaling, mean or deviation of the pictures, or the text that the
    chat templates write for two turns about one image.
    """
    pictures = [_image_settings(processor.image_processor) for processor in (student_processor, teacher_processor)]
    for name, student in pictures[0].items():
        if student != (teacher := pictures[1].get(name)):
            raise ValueError(
                f"{name} of the image processor is {student} in the student and {teacher} in the teacher: one encoded "
                "picture is read by both, so give the student the teacher's image_processor, or take a vision tower "
                "that sees pictures as the teacher does"
            )
    messages = [*PROBE, *({**message, "content": message["content"][-1:]} for message in PROBE)]
    student, teacher = (
        _render(processor.tokenizer, processor.chat_template, messages) if processor.chat_template else ""
        for processor in (student_processor, teacher_processor)
    )
    if student != teacher:
        raise ValueError(
            f"the chat template writes two turns as {student!r} in the student and as {teacher!r} in the teacher: one "
            "encoded conversation is read by both, so pass the teacher's as chat_template (student.chat_template)"
        )


def _image_settings(image_processor) -> dict:
    """Plain values, which compare across backends; the settings of a step that is not done are left out."""
    values = {}
    for step, settings in IMAGE_STEPS.items():
        values[step] = bool(getattr(image_processor, step, None))
        for name in settings if values[step] else ():
            value = getattr(image_processor, name)
            if name.endswith("size"):
                value = {side: length for side, length in dict(value).items() if length is not None}
            values[name] = list(value) if name.startswith("image_") else value
    return values
