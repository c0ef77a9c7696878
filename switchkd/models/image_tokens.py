"""Image tokens of encoded samples: how many images a sample has, and the same sample for a model with another number of
visual tokens an image."""

from __future__ import annotations

import torch
from torch import Tensor


def images_per_sample(input_ids: Tensor, image_token_id: int, tokens: int) -> Tensor:
    """[batch, time], with `tokens` image tokens for each image -> images of each sample, [batch].

    Raises ValueError where a sample's image tokens are no whole images.
    """
    marked = (input_ids == image_token_id).sum(1)
    if (marked % tokens).any():
        raise ValueError(
            f"the samples hold {marked.tolist()} image tokens and an image takes {tokens}: encode them with the "
            "student's own processor, and do not cut image tokens"
        )
    return marked // tokens


def with_image_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    image_token_id: int,
    *,
    given: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples with `wanted` image tokens in place of each image's `given`: input_ids, attention_mask and labels.

    All are [batch, time] before and [batch, another time] after. Text, padding included, keeps its order, mask and
    labels, and moves with the images before it; image tokens are attended to and have no labels. Samples with fewer
    images than others are padded on the right: id 0, mask 0, label -100.
    """
    batch, time = input_ids.shape
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    images = images_per_sample(input_ids, image_token_id, given)
    ends = time + (wanted - given) * images
    longest = int(ends.max())
    places = input_ids == image_token_id
    before = places.cumsum(1) // given  # whole images up to each position
    target = torch.arange(time, device=input_ids.device) + (wanted - given) * before
    target = target.masked_fill(places, longest)  # a column that is cut off again
    past = torch.arange(longest, device=input_ids.device) >= ends[:, None]

    def moved(tensor: Tensor, image: int, padding: int) -> Tensor:
        """Image tokens are where no text comes to lie."""
        wide = tensor.new_full((batch, longest + 1), image).scatter(1, target, tensor)
        return wide[:, :longest].masked_fill(past, padding)

    return moved(input_ids, image_token_id, 0), moved(attention_mask, 1, 0), moved(labels, -100, -100)
