"""The configuration of a model or of one of its parts, without its weights: as saved, and of a model of two parts."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from switchkd.models.config import StudentConfig
from switchkd.models.load import check_folder, named, reading
from switchkd.models.towers import tower_config, tower_kind


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

    The vocabulary grows where its rows do not hold `image_token_id`. Raises as `tower_kind`, and ValueError for
    a layer that the tower does not have.
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


def part_config(name: str, field: str | None = None, *, local_files_only: bool = False) -> PreTrainedConfig:
    """The configuration of a part, from a folder or the Hub. No remote code.

    Of a whole SigLIP or CLIP model it is the vision tower's. field: of the configuration that names it, for messages.
    local_files_only: the Hub is not asked. Raises FileNotFoundError for a folder without config.json and otherwise as
    `reading`.
    """
    check_folder(name, "model", field)
    with reading(name, "model", field):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_files_only)
    return tower_config(config)


def saved_config(path: str | Path, field: str | None = None) -> LlavaConfig:
    """The configuration of a whole LLaVA model, from a folder or the Hub.

    field: of the configuration that names it, for messages. Raises FileNotFoundError for a folder without config.json,
    ValueError for a model of another class, and otherwise as `reading`.
    """
    check_folder(path, "LLaVA model", field)
    with reading(path, "LLaVA model", field):
        kind = LlavaConfig.get_config_dict(path)[0].get("model_type")
    check_llava(named(path, field), kind)
    with reading(path, "LLaVA model", field):
        return LlavaConfig.from_pretrained(path)


def check_llava(name: str, kind: str | None) -> None:
    """ValueError where `kind`, the model type of what is called `name`, is not LLaVA's."""
    if kind != "llava":
        raise ValueError(
            f"{name} holds a model of type {kind!r}, not 'llava': students and teachers are "
            "LlavaForConditionalGeneration; assemble one from a vision tower and a language model, or convert a "
            "TinyLLaVA checkpoint with switchkd convert"
        )


def feature_layer(config: StudentConfig) -> int:
    """The layer of the vision tower that an assembled student's projector reads."""
    if config.vision_feature_layer is not None:
        return config.vision_feature_layer
    return -2 if config.vision_tower else -1
