"""The four steps of a vision-language model's forward, encode, project, decode and head, and the names of its parts.

`head(decode(project(encode(pixels))))` is the model's own forward (a test holds it to that). Cut open like this, one
model's features can enter another model's projector, which is all the visual switch is. Everything that asks how a
family of models is built inside asks its pathway: another family is one more class with these names, in a file of its
own, and one more entry of `PATHWAYS`, never a branch in a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from switchkd.models.towers import tower_kind


@dataclass(frozen=True)
class LlavaPathway:
    """The steps and parts of one LlavaForConditionalGeneration. It holds no state of its own beside the model."""

    model: LlavaForConditionalGeneration

    parts: ClassVar[dict[str, str]] = {
        "vision_tower": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language_model": "model.language_model",
    }
    """Part -> where it is in the model. The head, `lm_head`, is no part: it goes with the language model."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Vision tower features that the projector reads.

        pixel_values [images, 3, height, width] -> [images, visual tokens, width of the tower]: the hidden state of
        `config.vision_feature_layer` (several layers are joined on the last axis), without the class token where
        `config.vision_feature_select_strategy` is "default".
        """
        config = self.model.config
        tower = self.part("vision_tower")
        states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        layers = config.vision_feature_layer
        if isinstance(layers, int):
            return states[layers][:, first:]
        return torch.cat([states[layer][:, first:] for layer in layers], dim=-1)

    def project(self, features: Tensor) -> Tensor:
        """[images, visual tokens, width of the tower] -> [images, visual tokens, hidden size of the language model].

        The features may be another model's, of another dtype: they are read in the projector's.
        """
        projector = self.part("projector")
        return projector(features.to(next(projector.parameters()).dtype))

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visual_tokens: Tensor,
        *,
        image_token_id: int | None = None,
        blank: bool = False,
    ) -> Tensor:
        """Last hidden states of the language model, [batch, time, hidden size].

        `visual_tokens` [images, visual tokens, hidden size] take the places of the image tokens in `input_ids`
        [batch, time], in order. `image_token_id` marks them where another model's processor encoded the ids; None: the
        model's own. Ids there and under `attention_mask` 0 are not looked up, so they may lie past the model's rows.
        The cache is off: positions are read all at once. blank: the batch has no image, and `visual_tokens` are those
        of `blank_pixels`, which take no place. Raises ValueError where the places of a sample are no whole images, or
        those of the batch not as many as the visual tokens.
        """
        if image_token_id is None:
            image_token_id = self.model.config.image_token_id
        places = input_ids == image_token_id
        rows = visual_tokens.flatten(0, 1)
        _check_places(places.sum(1).tolist(), visual_tokens.shape[:2], image_token_id, blank)
        # With no image in the batch nothing is scattered, yet the tower stays in the graph: under ZeRO-3 and DDP every
        # rank must run the same modules.
        unread = places if attention_mask is None else places | (attention_mask == 0)
        embeddings = self.model.get_input_embeddings()(input_ids.masked_fill(unread, 0))
        embeddings = embeddings.masked_scatter(places.unsqueeze(-1), rows.to(embeddings.dtype))
        language_model = self.part("language_model")
        return language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    @property
    def head(self) -> nn.Linear:
        """The module [..., hidden size] -> logits [..., vocabulary rows]."""
        return self.model.lm_head

    def part(self, name: str) -> nn.Module:
        """The part of this name (`parts`)."""
        return self.model.get_submodule(self.parts[name])

    def layers(self, name: str) -> nn.ModuleList:
        """The layers of the vision tower or of the language model, one after the other."""
        if name == "vision_tower":
            return tower_kind(self.model.config.vision_config).layers_of(self.part(name))
        return self.part(name).layers

    @property
    def visual_token_count(self) -> int:
        """Visual tokens that `encode` gives for one image: the patches, with the class token of a tower that has one
        (CLIP), without the first token where `config.vision_feature_select_strategy` is "default"."""
        vision = self.model.config.vision_config
        class_token = tower_kind(vision).class_token
        dropped = self.model.config.vision_feature_select_strategy == "default"
        return (vision.image_size // vision.patch_size) ** 2 + class_token - dropped

    @property
    def feature_layers(self) -> list[int]:
        """The layers of the tower whose states `encode` gives, as the configuration counts them."""
        layers = self.model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def feature_width(self) -> int:
        """Width of the features that `encode` gives and the projector reads."""
        return self.model.config.vision_config.hidden_size * len(self.feature_layers)

    def unread(self) -> list[nn.Module | nn.Parameter]:
        """What of the tower no output depends on: layers past the last one that `encode` reads, the last norm, the
        pooling head."""
        tower, kind = self.part("vision_tower"), tower_kind(self.model.config.vision_config)
        layers = self.layers("vision_tower")
        last = max(layer if layer >= 0 else len(layers) + 1 + layer for layer in self.feature_layers)
        return [*layers[last:], *kind.unread_of(tower)]

    def blank_pixels(self, like: Tensor) -> Tensor:
        """One zero image [1, channels, height, width] for a batch without images, on `like`'s device."""
        vision = self.model.config.vision_config
        parameter = next(self.part("vision_tower").parameters())
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return torch.zeros(shape, dtype=parameter.dtype, device=like.device)


def _check_places(marked: list[int], visual_tokens: torch.Size, image_token_id: int, blank: bool) -> None:
    images, tokens = visual_tokens
    held = f"input_ids hold {sum(marked)} image tokens (id {image_token_id})"
    way_out = "encode the samples with the student's own processor, and do not cut image tokens"
    if blank:
        if any(marked):
            raise ValueError(f"{held} and there are no pixel_values: give the pictures of the batch")
    elif sum(marked) != images * tokens:
        raise ValueError(f"{held} but the {images} images give {images * tokens} visual tokens: {way_out}")
    elif torn := [sample for sample, places in enumerate(marked) if places % tokens]:
        raise ValueError(
            f"sample {torn[0]} of the batch holds {marked[torn[0]]} image tokens (id {image_token_id}) and an image "
            f"takes {tokens}: {way_out}"
        )


# By `config.model_type`.
PATHWAYS = {"llava": LlavaPathway}


def pathway_of(model: PreTrainedModel) -> LlavaPathway:
    """The pathway of a model by its family; ValueError naming the known ones where it is of none of them."""
    kind = model.config.model_type
    if kind not in PATHWAYS:
        raise ValueError(f"the model is of type {kind!r}; known families are {', '.join(PATHWAYS)}")
    return PATHWAYS[kind](model)
