"""The student that a configuration names: a whole model, two parts, or the package's own tiny one."""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)
from transformers.image_processing_utils import BaseImageProcessor

from switchkd.models.config import StudentConfig
from switchkd.models.image_processors import load_image_processor, tower_image_processor
from switchkd.models.llava import assemble_llava, freeze, load_llava, make_processor
from switchkd.models.load import load_processor, load_tokenizer, load_weights
from switchkd.models.shapes import feature_layer, part_config
from switchkd.models.tiny import STUDENT_SHAPE, VISION_TOWER, tiny_text_config, tiny_tokenizer
from switchkd.models.towers import tower_kind


def build_student(config: StudentConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The student and its processor, all that it uses to be trained (`freeze` decides anew).

    All weights in float32, as they are trained. New ones (a projector, the tiny language model) follow torch's
    seed: set it before. Raises ValueError where the parts do not fit together (`assemble_llava`).
    """
    if config.path:
        model, processor = load_llava(config.path, field="student.path", chat_template=config.chat_template)
    else:
        tokenizer = _tokenizer(config)
        if config.language_model:
            language_model = load_weights(
                AutoModelForCausalLM,
                config.language_model,
                "language model",
                "student.language_model",
                trust_remote_code=False,
            )
        else:
            language_model = Qwen2ForCausalLM(tiny_text_config(tokenizer, **STUDENT_SHAPE))
        model, processor = assemble_llava(
            load_vision_tower(config.vision_tower or str(VISION_TOWER)),
            language_model,
            tokenizer,
            vision_feature_layer=feature_layer(config),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=config.chat_template,
            image_processor=_image_processor(config),
        )
    freeze(model)
    return model, processor


def build_processor(config: StudentConfig, *, local_files_only: bool = False) -> LlavaProcessor:
    """The processor that `build_student` gives, without any weight.

    local_files_only: nothing is asked of the Hub; OSError where a file is not on this disk.
    """
    if config.path:
        return load_processor(
            config.path, "student.path", chat_template=config.chat_template, local_files_only=local_files_only
        )
    return make_processor(
        part_config(
            config.vision_tower or str(VISION_TOWER), "student.vision_tower", local_files_only=local_files_only
        ),
        _tokenizer(config, local_files_only=local_files_only),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=config.chat_template,
        image_processor=_image_processor(config, local_files_only=local_files_only),
    )


def _tokenizer(config: StudentConfig, **options) -> PreTrainedTokenizerBase:
    if not config.language_model:
        return tiny_tokenizer()
    return load_tokenizer(config.language_model, "student.language_model", **options)


def _image_processor(config: StudentConfig, **options) -> BaseImageProcessor | None:
    """As `config.image_processor` says, else as the settings beside the vision tower do, else None."""
    if config.image_processor:
        return load_image_processor(config.image_processor, "student.image_processor", **options)
    return tower_image_processor(config.vision_tower or str(VISION_TOWER), **options)


def load_vision_tower(path: str) -> PreTrainedModel:
    """A vision tower of a kind of `TOWERS` from a folder or Hub name, alone or inside a whole SigLIP or CLIP model.

    Raises FileNotFoundError for what is not there and ValueError for another type of model, and for weights that cannot
    be read or are not those of its config.json.
    """
    field = "student.vision_tower"
    vision = part_config(path, field)
    kind = tower_kind(vision, f"{field} {path}")
    return load_weights(kind.model, path, "vision tower", field, beside=kind.beside)
