"""The kinds of vision tower that a model can have, in one table: what sets them apart and nothing else.

Another kind is one more entry of `TOWERS`. It must be one that LlavaForConditionalGeneration holds: square pictures of
one size as [images, 3, height, width], and hidden states [images, tokens, width] of every layer, patches last.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class TowerKind:
    """model: its class. image_processor: the PIL class, which gives equal pixels with and without torchvision.

    whole: model type of the whole models that are published with such a tower inside, and beside: how the names of
    their other weights begin. class_token: whether a token
    stands before the patches. crops: whether its own pictures are scaled by their shortest edge and cut to the middle;
    else they are stretched to a square. layers: where in the model its list of layers is. unread: modules and
    parameters, where it has them, that no layer's hidden state depends on.
    """

    model: type[PreTrainedModel]
    image_processor: type[BaseImageProcessor]
    whole: str | None = None
    beside: tuple[str, ...] = ()
    class_token: bool = False
    crops: bool = False
    layers: str = "encoder.layers"
    unread: tuple[str, ...] = ("post_layernorm",)

    @property
    def select_strategy(self) -> str:
        """What LLaVA calls `vision_feature_select_strategy`: "default" drops the class token, "full" keeps all."""
        return "default" if self.class_token else "full"

    def own_image_processor(self, side: int) -> BaseImageProcessor:
        """Pictures of `side` x `side` px made as the tower's publishers do."""
        square = {"height": side, "width": side}
        if self.crops:
            return self.image_processor(size={"shortest_edge": side}, crop_size=square)
        return self.image_processor(size=square)

    def square_image_processor(self, side: int) -> BaseImageProcessor:
        """Pictures stretched to `side` x `side` px whatever their shape, with the kind's mean and deviation."""
        square = {"height": side, "width": side}
        return self.image_processor(size=square, **({"crop_size": square} if self.crops else {}))

    def layers_of(self, tower: nn.Module) -> nn.ModuleList:
        return tower.get_submodule(self.layers)

    def unread_of(self, tower: nn.Module) -> list[nn.Module | nn.Parameter]:
        found = []
        for name in self.unread:
            holder, _, last = name.rpartition(".")
            each = getattr(tower.get_submodule(holder), last, None)
            if each is not None:
                found.append(each)
        return found


TOWERS: dict[str, TowerKind] = {
    "siglip_vision_model": TowerKind(
        SiglipVisionModel,
        SiglipImageProcessorPil,
        whole="siglip",
        beside=("text_model.", "logit_scale", "logit_bias"),
        unread=("post_layernorm", "head"),
    ),
    "clip_vision_model": TowerKind(
        CLIPVisionModel,
        CLIPImageProcessorPil,
        whole="clip",
        beside=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        class_token=True,
        crops=True,
    ),
}


def tower_kind(vision: PreTrainedConfig, name: str = "the vision tower") -> TowerKind:
    """The kind of the tower that `vision` configures; `name` says whose it is where it is none of `TOWERS`: a
    ValueError that names them."""
    kind = vision.model_type
    if kind == "siglip2_vision_model":
        raise ValueError(
            f"{name} is of type {kind!r}, the NaFlex kind, which packs pictures into patches of varying number that "
            "LlavaForConditionalGeneration cannot read: take a SigLIP2 of fixed resolution (google/siglip2-*-384)"
        )
    if kind not in TOWERS:
        raise ValueError(f"{name} is of type {kind!r}: known are {', '.join(TOWERS)}")
    return TOWERS[kind]


def tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's part of the configuration of a whole model that is published around one; others as they are.

    NaFlex SigLIP2 is opened too, so that `tower_kind` can say what is wrong with it.
    """
    wholes = {kind.whole for kind in TOWERS.values() if kind.whole} | {"siglip2"}
    return config.vision_config if config.model_type in wholes else config
