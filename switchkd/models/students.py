"""The student that a configuration names: a whole model, two parts, or the package's own tiny one."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from switchkd.config import StudentConfig
from switchkd.models.llava import assemble_llava, freeze, load_llava
from switchkd.models.tiny import STUDENT_SHAPE, VISION_TOWER, tiny_text_config, tiny_tokenizer

TOWERS = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
}


def build_student(config: StudentConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The student and its processor, its `config.freeze` parts frozen.

    All weights in float32, as they are trained. New ones (a projector, the tiny language model) follow torch's
    seed: set it before.
    """
    if config.path:
        model, processor = load_llava(config.path)
    else:
        tower = load_vision_tower(config.vision_tower or str(VISION_TOWER))
        if config.language_model:
            tokenizer = AutoTokenizer.from_pretrained(config.language_model)
            language_model = AutoModelForCausalLM.from_pretrained(
                config.language_model, dtype=torch.float32, use_safetensors=True
            )
        else:
            tokenizer = tiny_tokenizer()
            language_model = Qwen2ForCausalLM(tiny_text_config(tokenizer, **STUDENT_SHAPE))
        layer = config.vision_feature_layer
        if layer is None:
            layer = -2 if config.vision_tower else -1
        model, processor = assemble_llava(
            tower, language_model, tokenizer, vision_feature_layer=layer, chat_template=config.chat_template
        )
    freeze(model, config.freeze)
    return model, processor


def load_vision_tower(path: str) -> PreTrainedModel:
    """A SigLIP or CLIP vision tower from a folder or Hub name, of its own or inside a whole SigLIP or CLIP model."""
    kind = AutoConfig.from_pretrained(path).model_type
    if kind not in TOWERS:
        raise ValueError(f"student.vision_tower {path} is of type {kind!r}: known are {', '.join(TOWERS)}")
    return TOWERS[kind].from_pretrained(path, dtype=torch.float32, use_safetensors=True)
