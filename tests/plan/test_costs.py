from __future__ import annotations

import pytest
import torch
from measured import measured_peak
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config, StableLmConfig

from switchkd.methods import SupervisedMethod, SwitchKD, terms
from switchkd.models import freeze
from switchkd.models.adapter import LinearAdapter
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora
from switchkd.models.planned import planned_part
from switchkd.models.shapes import llava_config
from switchkd.models.tiny import random_llava, tiny_vision_config
from switchkd.plan.costs import GRADIENTS, LANGUAGE_MODEL, PROJECTOR, SWITCH, TEACHER, TOWER, part_parameters, step_cost
from switchkd.plan.fakes import Batch, WithoutData, fake, fake_llava, meta_llava
from switchkd.plan.gpus import kept_memory

SIZES = {"vision_hidden": 32, "vision_layers": 2, "image_size": 32, "patch_size": 8, "layers": 2}
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}


def build(kind: str, student, teacher, checkpointing: bool = False):
    if kind == "supervised":
        return SupervisedMethod(student)
    return SwitchKD(student, teacher, align=kind, switch=kind, gradient_checkpointing=checkpointing)


def real(batch: dict) -> dict:
    """The same batch with a mask and pixels that have values."""
    mask = torch.ones(batch["attention_mask"].shape, dtype=torch.long)
    mask[0, -1] = 0
    return {**batch, "attention_mask": mask, "pixel_values": torch.randn(batch["pixel_values"].shape)}


def measured_flops(method, batch) -> int:
    method.train()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        method(**batch).loss.backward()
    return counter.get_total_flops()


def planned(kind, student, teacher, batch: Batch, *, checkpointing=False, autocast=False):
    """What the plan measures for the fake models of the same configurations."""
    models = [fake_llava(student.config), fake_llava(teacher.config)]
    freeze(models[0])
    with WithoutData():
        method = build(kind, *models, checkpointing)
    return step_cost(method, batch.tensors(models[0]), autocast=autocast)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["supervised", "dbild", "forward_kl"])
def test_arithmetic_without_data_is_that_of_a_real_step(student, teacher, kind, checkpointing, monkeypatch):
    monkeypatch.setattr(terms, "CHUNK_LOGITS", 5 * 400)  # several chunks, whose logits are recomputed
    batch = Batch(samples=3, tokens=30, answers=7)
    freeze(student)
    cost = planned(kind, student, teacher, batch, checkpointing=checkpointing)
    real_batch = real(batch.tensors(fake_llava(student.config)))
    measured = measured_flops(build(kind, student, teacher, checkpointing), real_batch)
    assert sum(cost.flops.values()) == pytest.approx(measured, rel=0.01)
    recomputed = {part for part, kind in cost.flops if kind == "recompute"}
    assert (SWITCH in recomputed) == (checkpointing and kind != "supervised")


def test_parameters_are_those_of_the_real_model(student):
    freeze(student, ["vision_tower"])
    without_data = fake_llava(student.config)
    freeze(without_data, ["vision_tower"])
    parts = part_parameters(without_data)
    assert parts == part_parameters(student)
    assert sum(map(sum, parts.values())) == student.num_parameters()
    assert sum(trained for trained, _ in parts.values()) == student.num_parameters(only_trainable=True)
    assert parts[TOWER] == (0, sum(p.numel() for p in student.model.vision_tower.parameters()))


def test_true_size_arithmetic_agrees_with_a_count_by_hand():
    vision = planned_part("google/siglip-so400m-patch14-384")
    small, large = planned_part("Qwen/Qwen2.5-0.5B"), planned_part("Qwen/Qwen2.5-3B")
    student, teacher = (fake_llava(llava_config(vision, text, 151_665)) for text in (small, large))
    freeze(student)
    with WithoutData():
        method = SwitchKD(student, teacher)
    samples, tokens, visual = 2, 900, 729
    flops = step_cost(method, Batch(samples, tokens, answers=100).tensors(student)).flops

    def layers(config, length: int, weights: int) -> int:
        """Forward of one sample: 2 for each weight and token, and two products of queries, keys and values."""
        return config.num_hidden_layers * (2 * weights * length + 4 * length**2 * config.hidden_size)

    def language_model(text) -> int:
        keys = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
        attention = 2 * text.hidden_size**2 + 2 * text.hidden_size * keys
        return layers(text, tokens, attention + 3 * text.hidden_size * text.intermediate_size)

    tower = layers(vision, visual, 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    projector = 2 * visual * (vision.hidden_size + large.hidden_size) * large.hidden_size
    by_hand = {
        (TOWER, "forward"): tower,
        (TOWER, "backward"): 2 * tower * 26 / 27,  # the last layer is not read
        (LANGUAGE_MODEL, "forward"): language_model(small),
        (LANGUAGE_MODEL, "backward"): 2 * language_model(small),
        (TEACHER, "forward"): tower + projector + language_model(large),
        (SWITCH, "forward"): projector + language_model(large),
        (SWITCH, "backward"): projector + language_model(large),  # of inputs alone: as much as forward
    }
    # Attention's backward forms the scores once more: five products for two.
    scores = 4 * tokens**2
    by_hand[LANGUAGE_MODEL, "backward"] += 0.5 * scores * small.hidden_size * small.num_hidden_layers
    by_hand[SWITCH, "backward"] += 1.5 * scores * large.hidden_size * large.num_hidden_layers
    by_hand[TOWER, "backward"] += 0.5 * 4 * visual**2 * vision.hidden_size * 26
    for key, count in by_hand.items():
        assert flops[key] / samples == pytest.approx(count, rel=0.02), key


def test_a_frozen_tower_has_no_way_back_and_lora_saves_weight_gradients(student, teacher):
    def cost(freeze_tower: bool, rank: int | None):
        model = meta_llava(student.config)
        freeze(model, ["vision_tower"] if freeze_tower else [])
        if rank:
            add_lora(model, rank)
        fake(model)
        return part_parameters(model), step_cost(SupervisedMethod(model), Batch(2, 30, 5).tensors(model))

    _, whole = cost(False, None)
    _, frozen = cost(True, None)
    adapters, lora = cost(True, 2)
    assert (TOWER, "backward") in whole.flops
    assert (TOWER, "backward") not in frozen.flops
    assert 0 < adapters[LANGUAGE_MODEL][0] < 0.1 * adapters[LANGUAGE_MODEL][1]
    assert lora.flops[LANGUAGE_MODEL, "backward"] < 0.8 * frozen.flops[LANGUAGE_MODEL, "backward"]
    assert lora.accumulating[GRADIENTS] < 0.5 * frozen.accumulating[GRADIENTS]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("kind", "samples", "width"),
    [("supervised", 8, 64), ("dbild", 8, 64), ("forward_kl", 8, 64), ("dbild", 1, 256), ("supervised", 1, 256)],
)
def test_memory_without_data_is_the_peak_of_a_real_run(kind, samples, width, autocast):
    """A wide model with one sample is weights, gradients and moments; a narrow one with eight is activations."""
    student, teacher = (random_llava(hidden=hidden, **SIZES) for hidden in (width, width + 32))
    freeze(student)
    batch = Batch(samples, tokens=120, answers=60)
    cost = planned(kind, student, teacher, batch, autocast=autocast)
    frozen = teacher.num_parameters() if kind != "supervised" else 0
    trained = student.num_parameters(only_trainable=True)
    kept = kept_memory(
        parameters=student.num_parameters(),
        trained=trained,
        teacher=frozen,
        engine="ddp",
        gpus=1,
        bf16=autocast,
        teacher_bf16=False,
    )
    assert cost.accumulating[GRADIENTS] == 4 * trained
    step = sum(cost.memory.values())
    assert step > sum(kept.values()) if samples == 8 else step < sum(kept.values())
    real_batch = real(batch.tensors(fake_llava(student.config)))
    measured = measured_peak(build(kind, student, teacher), real_batch, autocast)
    assert sum(kept.values()) + step == pytest.approx(measured, rel=0.15)


def test_gradient_checkpointing_saves_activations_and_costs_a_second_forward(student, teacher):
    batch = Batch(4, 60, 20)
    plain = planned("dbild", student, teacher, batch)
    recomputed = planned("dbild", student, teacher, batch, checkpointing=True)
    assert sum(recomputed.memory.values()) < 0.9 * sum(plain.memory.values())
    assert recomputed.memory[SWITCH] < 0.85 * plain.memory[SWITCH]  # one of its two layers at a time
    assert (SWITCH, "recompute") not in plain.flops
    again = recomputed.flops[SWITCH, "recompute"] / recomputed.flops[SWITCH, "forward"]
    assert 0.6 < again <= 1.0  # the last product of each layer is not needed again


def test_a_sample_too_short_for_its_image_is_refused(student):
    with pytest.raises(ValueError, match="20 tokens does not hold 16 visual tokens and 5 answer tokens"):
        Batch(1, tokens=20, answers=5).tensors(fake_llava(student.config))


def test_parts_are_told_apart_on_the_way_back(student, teacher):
    cost = planned("dbild", student, teacher, Batch(2, 30, 5))
    assert {part for part, kind in cost.flops if kind == "backward"} >= {TOWER, PROJECTOR, LANGUAGE_MODEL, SWITCH}
    assert (TEACHER, "backward") not in cost.flops
    projector = cost.flops[PROJECTOR, "forward"]
    assert cost.flops[PROJECTOR, "backward"] == 2 * projector


LANGUAGE_MODELS = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaConfig, {}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "phi": (PhiConfig, {}),
    "stablelm": (StableLmConfig, {"use_qkv_bias": True}),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_one_length_tells_the_arithmetic_of_another(kind):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    make, fields = LANGUAGE_MODELS[kind]
    text = make(**shape, num_key_value_heads=1, vocab_size=300, **fields)
    small, large = (tiny_vision_config(width, 3, image_size=32, patch_size=8) for width in (16, 24))
    student, teacher = (meta_llava(llava_config(vision, text, 299)) for vision in (small, large))
    freeze(student)
    recompute_activations(student)
    with torch.device("meta"):
        adapter = LinearAdapter.between(student, teacher)
    fakes = [fake(each) for each in (student, teacher, adapter)]
    with WithoutData():
        method = SwitchKD(*fakes[:2], feature="relation", switch_adapter=fakes[2], gradient_checkpointing=True)
    costs = {tokens: step_cost(method, Batch(3, tokens, answers=11).tensors(student)) for tokens in (90, 47)}
    assert costs[90].flops_at(47, of=90) == costs[47].flops
    assert costs[47].flops_at(90, of=47) == costs[90].flops
    assert costs[90].flops_at(47, of=90)[TEACHER, "forward"] < costs[90].flops[TEACHER, "forward"]


def test_without_a_kernel_of_attention_a_length_tells_nothing_of_another(student):
    model = fake_llava(student.config)
    model.set_attn_implementation("eager")
    assert step_cost(SupervisedMethod(model), Batch(2, 30, 5).tensors(model)).flops_at(20, of=30) is None
