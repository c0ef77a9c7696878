"""The configuration of a student, a teacher or one of their parts, without its weights.

`SHAPES` holds the numbers of well-known parts, so that a run can be planned without a download. They are those of the
config.json in each part's public repository; a test builds every one and compares its parameters with the published
total. Lengths of context are the Instruct models'.
"""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from switchkd.config import read_section
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.load import check_folder, load_tokenizer, named, reading
from switchkd.models.templates import image_row
from switchkd.models.tiny import STUDENT_SHAPE, TEACHER, VISION_TOWER, tiny_text_config, tiny_tokenizer
from switchkd.models.towers import tower_config, tower_kind

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def _qwen2(width: int, mlp: int, layers: int, heads: int, key_value_heads: int, rows: int = 151_936) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=rows == 151_936,  # the 7B model has a head of its own, and more padding rows
    )


def _qwen3(width: int, mlp: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )


def _siglip(width: int, mlp: int, layers: int, heads: int, image_size: int, patch_size: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )


def _clip_large(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=768,
    )


def _llama(width: int, mlp: int, layers: int, key_value_heads: int, rows: int, length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def llava_config(
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    image_token_id: int,
    *,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str | None = None,
) -> LlavaConfig:
    """A LLaVA model of two parts with a two-layer projector.

    vision_feature_select_strategy: "default" drops the first visual token, "full" keeps all; None: a class token
    (CLIP) is dropped and a tower without one (SigLIP) keeps all.

    The vocabulary grows where its rows do not hold `image_token_id`. Raises as `tower_kind`, and
    ValueError for a layer that the tower does not have.
    """
    tower = tower_kind(vision)
    vision, text = ({**part.to_dict(), "_name_or_path": ""} for part in (vision, text))  # where a part lay is nobody's
    layers = vision["num_hidden_layers"]
    if not -layers - 1 <= vision_feature_layer <= layers:
        raise ValueError(
            f"vision_feature_layer is {vision_feature_layer} and the vision tower has {layers} layers: give one of "
            f"{-layers - 1} to {layers} (student.vision_feature_layer)"
        )
    text["vocab_size"] = max(text["vocab_size"], image_token_id + 1)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy or tower.select_strategy,
        image_token_index=image_token_id,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    **{
        f"Qwen/Qwen2.5-{size}{kind}": _qwen2(*numbers)
        for size, numbers in {
            "0.5B": (896, 4864, 24, 14, 2),
            "1.5B": (1536, 8960, 28, 12, 2),
            "3B": (2048, 11_008, 36, 16, 2),
            "7B": (3584, 18_944, 28, 28, 4, 152_064),
        }.items()
        for kind in ("", "-Instruct")
    },
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(2048, 5632, 22, 4, rows=32_000, length=2048),
    "google/siglip-so400m-patch14-384": _siglip(1152, 4304, 27, 16, image_size=384, patch_size=14),
    "google/siglip2-so400m-patch14-384": _siglip(1152, 4304, 27, 16, image_size=384, patch_size=14),
    "google/siglip-base-patch16-224": _siglip(768, 3072, 12, 12, image_size=224, patch_size=16),
    "openai/clip-vit-large-patch14": _clip_large(224),
    "openai/clip-vit-large-patch14-336": _clip_large(336),
    "llava-hf/llava-1.5-7b-hf": LlavaConfig(
        vision_config=_clip_large(336).to_dict(),
        text_config=_llama(4096, 11_008, 32, 32, rows=32_064, length=4096).to_dict(),
        image_token_index=32_000,
    ),
}
# Tokens of each vocabulary, fewer than its rows: where <image> goes.
TOKENS = {
    name: 151_665 if "Qwen2.5" in name else 151_669 if "Qwen3" in name else 32_000
    for name, shape in SHAPES.items()
    if shape.model_type in ("qwen2", "qwen3", "llama")
}


def part_config(name: str, field: str | None = None) -> PreTrainedConfig:
    """The configuration of a part: of a folder, else of `SHAPES`, else of the Hub. No remote code.

    Of a whole SigLIP or CLIP model it is the vision tower's. field: of the configuration that names it, for messages.
    Raises FileNotFoundError for a folder without config.json and otherwise as `reading`.
    """
    check_folder(name, "model", field)
    if name in SHAPES and not Path(name).is_dir():
        return copy.deepcopy(SHAPES[name])
    with reading(name, "model", field):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return tower_config(config)


def saved_config(path: str | Path, field: str | None = None) -> LlavaConfig:
    """The configuration of a whole LLaVA model, from a folder, `SHAPES` or the Hub.

    field: of the configuration that names it, for messages. Raises FileNotFoundError for a folder without config.json,
    ValueError for a model of another class, and otherwise as `reading`.
    """
    check_folder(path, "LLaVA model", field)
    known = SHAPES.get(str(path)) if not Path(path).is_dir() else None
    with reading(path, "LLaVA model", field):
        kind = known.model_type if known else LlavaConfig.get_config_dict(path)[0].get("model_type")
    if kind != "llava":
        raise ValueError(
            f"{named(path, field)} holds a model of type {kind!r}, not 'llava': students and teachers are "
            "LlavaForConditionalGeneration; assemble one from a vision tower and a language model, or convert a "
            "TinyLLaVA checkpoint with switchkd convert"
        )
    with reading(path, "LLaVA model", field):
        return copy.deepcopy(known) or LlavaConfig.from_pretrained(path)


def student_config(config: StudentConfig) -> LlavaConfig:
    """The configuration of the student that `build_student` makes, without weights.

    A language model's folder that brings no tokenizer is taken to use all its rows, so that `<image>` adds one. Raises
    as `part_config`, `saved_config` and `llava_config`.
    """
    if config.path:
        return saved_config(config.path, "student.path")
    vision = part_config(config.vision_tower or str(VISION_TOWER), "student.vision_tower")
    tower_kind(vision, f"student.vision_tower {config.vision_tower}")
    name = config.language_model
    if name is None:
        tokenizer = tiny_tokenizer()
        text, image_token_id = tiny_text_config(tokenizer, **STUDENT_SHAPE), image_row(tokenizer)
    else:
        text = part_config(name, "student.language_model")
        folder = Path(name)
        if not folder.is_dir() and name in TOKENS:
            image_token_id = TOKENS[name]
        elif folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            image_token_id = text.vocab_size
        else:
            image_token_id = image_row(load_tokenizer(name, "student.language_model"))
    return llava_config(
        vision,
        text,
        image_token_id,
        vision_feature_layer=feature_layer(config),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )


def teacher_config(config: TeacherConfig) -> LlavaConfig:
    """The configuration of a teacher: the package's tiny one, that of `config.path`, or while that does not exist yet
    of what `config.made_by` makes. Raises as `saved_config` and `student_config`."""
    if config.made_by and not Path(config.path).exists():
        return student_config(read_section(config.made_by, "student", StudentConfig))
    return saved_config(config.path or TEACHER, "teacher.path")


def feature_layer(config: StudentConfig) -> int:
    """The layer of the vision tower that an assembled student's projector reads."""
    if config.vision_feature_layer is not None:
        return config.vision_feature_layer
    return -2 if config.vision_tower else -1
