"""The four steps of a LLaVA-style forward: encode, project, decode, head.

`head(decode(project(encode(pixels))))` is the model's own forward (a test holds it to that). Cut open like this, one
model's features can enter another model's projector, which is all the visual switch is. Another VLM family is one
more set of these four steps, never a branch in a method.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.models.towers import tower_kind


def encode(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Vision tower features that the projector reads.

    pixel_values [images, 3, height, width] -> [images, visual tokens, width of the tower]: the hidden state of
    `config.vision_feature_layer` (several layers are joined on the last axis), without the class token where
    `config.vision_feature_select_strategy` is "default".
    """
    config = model.config
    states = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    layers = config.vision_feature_layer
    if isinstance(layers, int):
        return states[layers][:, first:]
    return torch.cat([states[layer][:, first:] for layer in layers], dim=-1)


def project(model: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """[images, visual tokens, width of the tower] -> [images, visual tokens, hidden size of the language model].

    The features may be another model's, of another dtype: they are read in the projector's.
    """
    projector = model.model.multi_modal_projector
    return projector(features.to(next(projector.parameters()).dtype))


def decode(
    model: LlavaForConditionalGeneration,
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
    model's own. Ids there and under `attention_mask` 0 are not looked up, so they may lie past the model's rows. The
    cache is off: positions are read all at once. blank: the batch has no image, and `visual_tokens` are those of
    `blank_pixels`, which take no place. Raises ValueError where the places of a sample are no whole images, or those of
    the batch not as many as the visual tokens.
    """
    if image_token_id is None:
        image_token_id = model.config.image_token_id
    places = input_ids == image_token_id
    rows = visual_tokens.flatten(0, 1)
    _check_places(places.sum(1).tolist(), visual_tokens.shape[:2], image_token_id, blank)
    # With no image in the batch nothing is scattered, yet the tower stays in the graph: under ZeRO-3 and DDP every
    # rank must run the same modules.
    unread = places if attention_mask is None else places | (attention_mask == 0)
    embeddings = model.get_input_embeddings()(input_ids.masked_fill(unread, 0))
    embeddings = embeddings.masked_scatter(places.unsqueeze(-1), rows.to(embeddings.dtype))
    return model.model.language_model(
        inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state


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


def head(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """[..., hidden size] -> logits [..., vocabulary rows]."""
    return model.lm_head(hidden)


def visual_token_count(model: LlavaForConditionalGeneration) -> int:
    """Visual tokens that `encode` gives for one image: the patches, with the class token of a tower that has one
    (CLIP), without the first token where `config.vision_feature_select_strategy` is "default"."""
    vision = model.config.vision_config
    class_token = tower_kind(vision).class_token
    dropped = model.config.vision_feature_select_strategy == "default"
    return (vision.image_size // vision.patch_size) ** 2 + class_token - dropped


def feature_width(model: LlavaForConditionalGeneration) -> int:
    """Width of the features that `encode` gives and the projector reads."""
    layers = model.config.vision_feature_layer
    return model.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def blank_pixels(model: LlavaForConditionalGeneration, like: Tensor) -> Tensor:
    """One zero image [1, channels, height, width] for a batch without images, on `like`'s device."""
    vision = model.config.vision_config
    parameter = next(model.model.vision_tower.parameters())
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    return torch.zeros(shape, dtype=parameter.dtype, device=like.device)
