"""The models of the ten skills, and their vision towers pretrained on what the scenes show.

A rendered world has dense labels for nothing: what lies in the cell under each patch. A tower that has learnt them
stands where SigLIP stands for a real LLaVA, and the language side then leaves the blind answers some ten times sooner
(in a pilot of ours after 300 steps of 64, where one from scratch needed thousands).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, get_scheduler

from eval.ten_skills.fast_step import Feed, autocast, orders
from eval.ten_skills.scenes import CELLS, COLOURS, SIZES, SPRITES, SURFACES
from eval.ten_skills.sizes import Size
from eval.ten_skills.words import IMAGE_ID, tokenizer
from eval.ten_skills.world import Samples
from switchkd.models import freeze
from switchkd.models.pathway import pathway_of
from switchkd.models.tiny import tiny_text_config, tiny_vision_config

HEADS = (len(SPRITES) + 1, len(COLOURS) + 1, len(SURFACES) + 1, len(SIZES) + 1, 5)  # a class more: none


def build_model(size: Size, language: tuple[int, int], vision: tuple[int, int]) -> LlavaForConditionalGeneration:
    """A randomly started LLaVA of these (width, layers), all of it trained; seed torch before.

    The language model starts at 1 / sqrt(width), which keeps a state's variance through a layer. The stock 0.02 suits
    widths of some 2,500; at 64 to 128 it makes every layer five times too quiet, and the blind plateau long.
    """
    text = tiny_text_config(tokenizer(), *language)
    text.initializer_range = language[0] ** -0.5
    config = LlavaConfig(
        vision_config=tiny_vision_config(*vision, size.image, size.patch),
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE_ID,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    freeze(model)
    return model


def dense_labels(samples: Samples, image: int, patch: int) -> np.ndarray:
    """What each patch's cell shows, int64 [N, patches, 5]: sprite, colour, surface and size, each plus one, 0 for none;
    and the height of the bar in the patch's quarter of the picture, whose colour then stands for the cell's."""
    middles = (np.arange(0, image, patch) + patch / 2) / image
    halves, quarters = (middles * 2).astype(int), np.tile((middles * 4).astype(int), len(middles))
    cells = np.array([CELLS.index((row, column)) for row in halves for column in halves])
    scenes = samples.scenes
    shown, bars = scenes.sprite[:, cells] >= 0, scenes.bars[:, quarters]
    labels = [
        scenes.sprite[:, cells] + 1,
        np.where(shown, scenes.colour[:, cells] + 1, np.where(bars > 0, scenes.colour[:, quarters] + 1, 0)),
        np.where(shown, scenes.surface[:, cells] + 1, 0),
        np.where(shown, scenes.size[:, cells] + 1, 0),
        bars,
    ]
    return np.stack(labels, axis=-1).astype(np.int64)


def pretrain_tower(
    model: LlavaForConditionalGeneration, feed: Feed, size: Size, *, steps: int, seed: int, say=lambda line: None
) -> float:
    """Trains the vision tower to name what its patches show, by one linear layer that is thrown away.

    Returns the share of patches with an object, among those of the last 20 steps, whose sprite it names.
    """
    labels = torch.from_numpy(dense_labels(feed.samples, size.image, size.patch)).to(feed.images.device)
    probe = nn.Linear(model.config.vision_config.hidden_size, sum(HEADS)).to(feed.images.device)
    tower = [parameter for parameter in model.model.vision_tower.parameters() if parameter.requires_grad]
    parameters = [*tower, *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=size.tower_lr, weight_decay=0.0, fused=True)
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)
    named: list[Tensor] = []
    for step, rows in enumerate(orders(len(feed), steps, size.tower_batch, seed).to(feed.images.device)):
        with autocast(feed.images.device, size.bf16):
            features = pathway_of(model).encode(feed.batch(rows)["pixel_values"])
            heads = probe(features).float().split(HEADS, dim=-1)
        known = labels[rows].unbind(dim=-1)
        loss = sum(F.cross_entropy(head.flatten(0, 1), each.flatten()) for head, each in zip(heads, known, strict=True))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        named = [*named[-19:], (heads[0].argmax(-1) == known[0])[known[0] > 0].float().mean()]
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {steps}: {float(torch.stack(named).mean()):.2f} of the sprites named")
    return float(torch.stack(named).mean()) if named else 0.0
