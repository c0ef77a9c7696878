"""Stock LLaVA models: load, assemble, freeze, recompute activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from switchkd.models.image_processors import check_picture_size
from switchkd.models.load import load_processor, load_weights
from switchkd.models.pathway import pathway_of
from switchkd.models.shapes import llava_config, saved_config
from switchkd.models.templates import IMAGE_TOKEN, add_image_token, end_tokens, image_template
from switchkd.models.towers import tower_kind


def load_llava(
    path: str | Path, dtype: torch.dtype = torch.float32, *, field: str | None = None, chat_template: str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA model and its processor from a folder or a Hub name; safetensors only, no remote code.

    field: of the configuration that names the path, for messages. chat_template: in place of the saved one; the model
    then stops at its end of turn too. Raises FileNotFoundError for what is not there and ValueError for a model of
    another class, for weights that cannot be read or are not those of its config.json, and for a template without
    images.
    """
    saved_config(path, field)
    model = load_weights(LlavaForConditionalGeneration, path, "LLaVA model", field, dtype=dtype)
    processor = load_processor(path, field, chat_template=chat_template)
    if chat_template:
        _stop_at(model, end_tokens(model, processor.tokenizer, chat_template))
    return model, processor


def assemble_llava(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA model from a vision tower and a causal language model, with a new two-layer projector.

    vision_tower: of a kind of `TOWERS`. language_model: any causal language model with `lm_head`, as
    Qwen2.5, Qwen3, Llama, Phi-3 and StableLM; its embedding rows grow only when they do not hold `<image>` already.
    tokenizer, chat_template, image_processor, vision_feature_select_strategy: as `make_processor` takes them.
    The projector's start follows torch's seed. All weights are float32, and what is float32 already is shared with
    the two models given, not copied: use those no further. `generate` stops at the template's end of turn too.
    Raises ValueError for another vision tower, for pictures of another size than it reads, for a head with a bias that
    is not zero (Phi-1.5, Phi-2: the stock class has no place for it), for language models that the stock class does not
    take (GPT-2, OPT), and where no template takes images.
    """
    vision = vision_tower.config
    tower_kind(vision)
    bias = getattr(language_model.get_output_embeddings(), "bias", None)
    if bias is not None and bias.any():
        raise ValueError(
            f"the language model of type {language_model.config.model_type!r} has a head bias that is not zero, and "
            "LlavaForConditionalGeneration holds none: take one without (Qwen2.5, Qwen3, Llama, Phi-3, StableLM)"
        )
    processor = make_processor(
        vision,
        tokenizer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        chat_template=chat_template,
        image_processor=image_processor,
    )
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
    config = llava_config(
        vision,
        language_model.config,
        processor.image_token_id,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
    )
    try:
        model = LlavaForConditionalGeneration(config)
    except AttributeError as error:  # GPT-2, OPT, BERT, Mamba: their embeddings have no name that it knows
        raise ValueError(
            f"a language model of type {config.text_config.model_type!r} cannot stand in LlavaForConditionalGeneration "
            f"({error}): take Qwen2.5, Qwen3, Llama, Phi-3 or StableLM"
        ) from error
    # With keep_vars the parameters themselves change hands, so that tied ones stay tied. The model's own random ones
    # are made first all the same: on the meta device its rotary buffers would have no values.
    for part, given in (
        (model.model.vision_tower, vision_tower.state_dict(keep_vars=True)),
        (model.model.language_model, language_model.get_decoder().state_dict(keep_vars=True)),
        (model.lm_head, {"weight": language_model.get_output_embeddings().weight}),
    ):
        part.load_state_dict(given, assign=True)
    model.float()
    _stop_at(model, end_tokens(language_model, tokenizer, processor.chat_template))
    return model, processor


def _stop_at(model: LlavaForConditionalGeneration, ends: list[int]) -> None:
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends


def make_processor(
    vision: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    image_processor: BaseImageProcessor | None = None,
) -> LlavaProcessor:
    """The processor of a LLaVA model of this vision tower and tokenizer; the tokenizer is changed to what it needs.

    tokenizer: `<image>` is added where it is missing. One without a padding token pads with its unknown or else its end
    token (LLaVA 1.5 does so too): masks, not ids, say what is padding.
    vision_feature_select_strategy: "default" drops the first visual token, "full" keeps all; None: as `llava_config`.
    chat_template: left out, the tokenizer's own where it takes images; where it takes text alone and its turns are
    ChatML's (Qwen2.5), or it has none but has ChatML's tokens, ChatML with images and without a default system prompt.
    The tokenizer takes it on. image_processor: left out, the tower's kind with pictures resized to a square.
    Raises ValueError for pictures of another size than the tower reads, and where no template takes images.
    """
    tower = tower_kind(vision)
    image_processor = image_processor or tower.square_image_processor(vision.image_size)
    check_picture_size(image_processor, vision)
    tokenizer.chat_template = image_template(tokenizer, chat_template)
    add_image_token(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy or tower.select_strategy,
        num_additional_image_tokens=int(tower.class_token),
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )


def recompute_activations(model: PreTrainedModel) -> None:
    """The layers of tower and language model recompute their activations in backward instead of keeping them.

    Gradients stay bit for bit the same, and a frozen tower still has none to compute. A layer recomputes only while its
    own `training` is True.
    """
    # Renamed in transformers 5.2x; the old name goes in v6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also makes the embeddings' outputs require a gradient, which the non-reentrant kind does not need: backward
    # would run through a frozen vision tower.
    model.disable_input_require_grads()


def freeze(model: PreTrainedModel, parts: Sequence[str] = ()) -> None:
    """Freezes the named parts ("vision_tower", "projector", "language_model"; with it its head) and trains the rest.

    The tower's parameters that no output depends on (layers past `vision_feature_layer`, the last norm, the pooling
    head) are always frozen: DDP waits for their gradient and weight decay would move them.
    """
    path = pathway_of(model)
    unknown = [part for part in parts if part not in path.parts]
    if unknown:
        raise ValueError(f"freeze: {unknown} is not a part of the model; known are {', '.join(path.parts)}")
    model.requires_grad_(True)
    for part in parts:
        path.part(part).requires_grad_(False)
        if part == "language_model":
            path.head.requires_grad_(False)
    for each in path.unread():
        each.requires_grad_(False)
