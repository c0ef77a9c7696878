"""A run of equal layers, shortened to one that is measured and stands for all of them.

A model of 36 equal layers costs what its first, one in the middle and its last cost, the middle one 34 times: a plan
takes seconds instead of minutes, and its numbers stay the same to the byte (`switchkd.plan.costs`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from switchkd.models.pathway import pathway_of

OWN = ("layer_idx",)  # what equal layers differ in


@dataclass(frozen=True)
class Repeated:
    """`layer` stands for `times` equal ones in a row; `following` is the layer after them."""

    layer: nn.Module
    following: nn.Module
    times: int


def shorten(model: PreTrainedModel) -> list[Repeated]:
    """Takes out, in place, the equal layers of vision tower and language model that another one can stand for.

    Left are the first layer, one for those after it, and all from the first one on whose states the projector reads; of
    the language model the last. Where layers differ, in weights, in what of them trains or in kind, all stay.
    """
    path = pathway_of(model)
    repeated = []
    for name in ("vision_tower", "language_model"):
        layers = path.layers(name)
        last = len(layers)  # the first layer, counted from 1, whose states anything else than the next layer reads
        if name == "vision_tower":
            read = [layer if layer >= 0 else len(layers) + 1 + layer for layer in path.feature_layers]
            last = min(read)
        times = last - 2
        if times < 2 or not _equal(layers[: last - 1], path.part(name).config):
            continue
        if name == "vision_tower":
            # Counted from the end, they stay what they are.
            model.config = copy.copy(model.config)
            from_end = [layer - len(layers) - 1 for layer in read]
            model.config.vision_feature_layer = from_end[0] if len(from_end) == 1 else from_end
        del layers[2 : last - 1]
        repeated.append(Repeated(layers[1], layers[2], times))
    return repeated


def _equal(layers: nn.ModuleList, config) -> bool:
    kinds = getattr(config, "layer_types", None) or [None]
    return len(set(kinds)) == 1 and all(_signature(layer) == _signature(layers[0]) for layer in layers)


def _signature(layer: nn.Module) -> list:
    """All that decides what a layer costs: its modules with their settings, its weights and which of them train."""
    settings = [
        (
            type(module),
            {key: value for key, value in vars(module).items() if _is_setting(value) and key not in OWN},
        )
        for module in layer.modules()
    ]
    weights = [(name, each.shape, each.dtype, each.requires_grad) for name, each in layer.named_parameters()]
    return [settings, weights]


def _is_setting(value) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
