"""One layer that stands for many costs what the many cost: to the byte, and to the operation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, Qwen2Config

from switchkd.methods import SupervisedMethod, SwitchKD, Terms
from switchkd.models import freeze
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora
from switchkd.models.shapes import llava_config
from switchkd.models.tiny import tiny_vision_config
from switchkd.plan.costs import GRADIENTS, StepCost, step_cost
from switchkd.plan.fakes import Batch, WithoutData, fake, meta_llava
from switchkd.plan.repeats import Repeated, shorten

STUDENT, TEACHER = (6, 7, 32), (9, 5, 48)  # layers of the language model, of the tower, width


def config(layers: int, tower_layers: int, width: int, *, read=-2, clip: bool = False, **fields):
    shape = {"hidden_size": width, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = Qwen2Config(**shape, num_hidden_layers=layers, vocab_size=400, tie_word_embeddings=True, **fields)
    if clip:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        vision = CLIPVisionConfig(**sizes, num_hidden_layers=tower_layers, image_size=32, patch_size=8)
    else:
        vision = tiny_vision_config(32, tower_layers, image_size=32, patch_size=8)
    made = llava_config(vision, text, 399)
    made.vision_feature_layer = read
    return made


def cost(
    short: bool,
    kind: str | None,
    *,
    frozen=(),
    rank: int = 0,
    checkpointing: bool = False,
    autocast: bool = False,
    **fields,
) -> tuple[StepCost, list[int]]:
    """Of a step of the method on fake models, shortened or not; and what each repeated layer stands for."""
    student, teacher = (meta_llava(config(*sizes, **fields)) for sizes in (STUDENT, TEACHER))
    teacher.bfloat16()
    freeze(student, frozen)
    if rank:
        add_lora(student, rank)
    if checkpointing:
        recompute_activations(student)
    repeated = shorten(student) + shorten(teacher) if short else []
    for model in (student, teacher):
        fake(model)
    with WithoutData():
        if kind is None:
            method = SupervisedMethod(student)
        else:
            switch = None if "vision_tower" in frozen else kind
            method = SwitchKD(student, teacher, align=kind, switch=switch, gradient_checkpointing=checkpointing)
    batch = Batch(samples=2, tokens=60, answers=20).tensors(student)
    return step_cost(method, batch, autocast=autocast, repeated=repeated), [each.times for each in repeated]


def alike(**settings) -> list[int]:
    (whole, _), (short, times) = cost(False, **settings), cost(True, **settings)
    assert short.flops == whole.flops
    for name in ("memory", "accumulating"):
        ours, theirs = ({k: v for k, v in getattr(each, name).items() if v} for each in (short, whole))
        assert ours == theirs, name
    assert short.accumulating[GRADIENTS] > 0
    return times


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": None},
        {"kind": None, "checkpointing": True, "autocast": True},
        {"kind": None, "frozen": ("vision_tower", "language_model"), "autocast": True},
        {"kind": "dbild", "checkpointing": True, "autocast": True},
        {"kind": "dbild", "frozen": ("vision_tower",)},
        {"kind": "forward_kl", "rank": 4, "autocast": True},
        {"kind": "forward_kl", "rank": 4, "checkpointing": True, "clip": True},
    ],
    ids=str,
)
def test_one_layer_that_stands_for_many_costs_what_they_do(settings):
    assert alike(**settings) == [4, 4, 2, 7]


@pytest.mark.parametrize(
    ("read", "times"),
    [
        (-1, [5, 4, 3, 7]),
        (-3, [3, 4, 7]),  # of the teacher's five layers three are read, and the one in the middle stands for itself
        (4, [2, 4, 2, 7]),  # of both towers the fourth layer
        ([-1, 5], [3, 4, 3, 7]),
    ],
)
def test_layers_that_the_projector_reads_stay(read, times):
    assert alike(kind="forward_kl", read=read) == times


def test_the_configuration_given_stays_as_it_was():
    given = config(*STUDENT, read=4)
    model = meta_llava(given)
    assert [each.times for each in shorten(model)] == [2, 4]
    assert given.vision_feature_layer == 4
    assert model.config.vision_feature_layer == -4


def test_layers_that_differ_all_stay():
    mixed = config(*STUDENT, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert [each.times for each in shorten(meta_llava(mixed))] == [4]  # of the tower alone
    for change in (
        lambda layer: layer.mlp.requires_grad_(False),
        lambda layer: layer.self_attn.q_proj.register_parameter("bias", None),
        lambda layer: setattr(layer.self_attn, "scaling", 2.0),
        lambda layer: layer.to(torch.bfloat16),
    ):
        model = meta_llava(config(*STUDENT))
        change(model.model.language_model.layers[3])
        assert [each.times for each in shorten(model)] == [4]
    few = meta_llava(config(3, 3, 32))
    assert shorten(few) == []
    assert len(few.model.language_model.layers) == 3


class Wide(nn.Module):
    """A layer that holds for a moment much more than it leaves behind, and lets go of what `stash` still holds."""

    def __init__(self, width: int, stash: list):
        super().__init__()
        self.weight, self.stash = nn.Parameter(torch.ones(width, width)), stash

    def forward(self, states):
        self.stash.clear()
        with torch.no_grad():
            states.repeat(500, 1)  # forward alone
        return states + torch.tanh(states @ self.weight)


class Stack(nn.Module):
    """A method of `layers` wide layers between two narrow ones, forward alone or with a way back."""

    def __init__(self, layers: int, *, width: int, held: int, alone: bool):
        super().__init__()
        self.held, self.alone, self.stash = held, alone, []
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Wide(width, self.stash) for _ in range(layers))

    def forward(self, states):
        with torch.set_grad_enabled(not self.alone):
            states = self.first(states)
            if self.held:
                self.stash.append(torch.ones(self.held))
            for layer in self.layers:
                states = layer(states)
        return Terms(loss=self.last(states).sum())


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("held", [0, 100, 100_000])
@pytest.mark.parametrize("width", [8, 256])  # activations outweigh gradients, or the other way round
def test_the_most_alive_can_lie_in_the_last_of_the_layers_that_one_stands_for(width, held, alone):
    states, options = torch.ones(4, width), {"width": width, "held": held, "alone": alone}
    whole = step_cost(Stack(6, **options), {"states": states})
    short = Stack(1, **options)
    repeated = [Repeated(short.layers[0], short.last, 6)]
    assert step_cost(short, {"states": states}, repeated=repeated) == whole
