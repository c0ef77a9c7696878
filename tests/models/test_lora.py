"""LoRA on parts of a student: what trains, that the merged model is the live one and stock, the adapter's folder."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    SiglipVisionConfig,
)

from switchkd.config import Stage
from switchkd.methods import SupervisedMethod
from switchkd.models import freeze
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora, check_lora, merge_lora, save_adapter
from switchkd.training.config import TrainConfig

LANGUAGE_MODEL = "model.language_model."
TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."


def train(model, batch, steps=1):
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    method = SupervisedMethod(model).train()
    for _ in range(steps):
        method(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def trained_names(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_every_linear_layer_of_the_language_model_and_nothing_else(student):
    freeze(student, ["vision_tower"])
    linear = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    add_lora(student, 4)
    with_adapter = {name.partition(".lora_A")[0] for name, _ in student.named_parameters() if ".lora_A" in name}
    assert with_adapter == {name for name in linear if name.startswith(LANGUAGE_MODEL)}
    assert len(with_adapter) == 14
    trained = trained_names(student)
    assert {name for name in trained if "lora_" not in name} == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert type(student) is LlavaForConditionalGeneration
    assert student.peft_config["default"].lora_alpha == 8


def adapted_names(model):
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (["vision_tower"], (TOWER,)),
        (["projector"], (PROJECTOR,)),
        (["projector", "language_model"], (PROJECTOR, LANGUAGE_MODEL)),
        (["language_model", "vision_tower", "projector"], (TOWER, PROJECTOR, LANGUAGE_MODEL)),
    ],
)
@pytest.mark.parametrize("read", [-1, -2])
def test_any_parts_and_the_others_as_they_were(student, batch, parts, prefixes, read):
    student.config.vision_feature_layer = read
    freeze(student)
    before = trained_names(student)
    linear = [name for name, module in student.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    start = {name: weight.clone() for name, weight in student.state_dict().items()}
    add_lora(student, 2, parts=parts)
    unread = (f"{TOWER}head.", *([f"{TOWER}encoder.layers.1."] if read == -2 else []))
    expected = {name for name in linear if name.startswith(prefixes) and not name.startswith(unread)}
    assert adapted_names(student) == expected
    own = (*prefixes, "lm_head.") if "language_model" in parts else prefixes
    others = {name for name in before if not name.startswith(own)}
    assert {name for name in trained_names(student) if "lora_" not in name} == others

    train(student, batch, steps=2)
    live = logits(student, batch)
    merge_lora(student)
    torch.testing.assert_close(logits(student, batch), live, atol=1e-5, rtol=1e-5)
    assert student.state_dict().keys() == start.keys()
    moved = {name for name, weight in student.state_dict().items() if not torch.equal(weight, start[name])}
    assert {f"{name}.weight" for name in expected} <= moved
    assert all(name.startswith(prefixes) == (name.removesuffix(".weight") in expected) for name in moved)


def test_what_freeze_said_of_tower_and_projector_stays(student):
    student.config.vision_feature_layer = -2  # leaves tower parameters that are always frozen
    for parts in ((), ("projector",), ("vision_tower", "projector")):
        freeze(student, parts)
        before = {name for name in trained_names(student) if not name.startswith((LANGUAGE_MODEL, "lm_head"))}
        add_lora(student, 2)
        assert {name for name in trained_names(student) if "lora_" not in name} == before
        merge_lora(student)


def test_the_start_changes_nothing_and_follows_the_seed(student, batch):
    before = logits(student, batch)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        add_lora(student, 4)
        assert torch.equal(logits(student, batch), before)
        starts.append({name: weight.clone() for name, weight in student.named_parameters() if "lora_A" in name})
        merge_lora(student)
    name = next(iter(starts[0]))
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("recomputed", [False, True])
def test_merged_it_is_the_live_model_in_the_stock_class(tmp_path, student, batch, recomputed):
    freeze(student)
    stock_names, attributes = list(student.state_dict()), set(vars(student))
    base = {name: weight.clone() for name, weight in student.state_dict().items()}
    start = logits(student, batch)
    add_lora(student, 4, alpha=4, dropout=0.1)
    if recomputed:
        recompute_activations(student)
    train(student, batch, steps=2)
    live = logits(student, batch)
    layer = student.model.language_model.layers[0].mlp.up_proj
    added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha over rank is 1
    assert torch.equal(layer.base_layer.weight, base[f"{LANGUAGE_MODEL}layers.0.mlp.up_proj.weight"])

    merge_lora(student)
    assert (live - start).abs().max() > 0.05
    torch.testing.assert_close(logits(student, batch), live, atol=1e-5, rtol=1e-5)
    assert list(student.state_dict()) == stock_names
    assert set(vars(student)) - attributes <= {"_require_grads_hooks"}  # recompute_activations leaves it
    merged = student.state_dict()
    up_proj = f"{LANGUAGE_MODEL}layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[up_proj], base[up_proj] + added)
    for name in stock_names:
        if name.startswith((LANGUAGE_MODEL, "lm_head")):
            assert torch.equal(merged[name], base[name]) != name.endswith("_proj.weight"), name
    assert student.lm_head.weight is student.get_input_embeddings().weight

    student.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, batch), live, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients(student, batch):
    torch.manual_seed(3)
    add_lora(student, 4)
    gradients = []
    for _ in range(2):
        SupervisedMethod(student).train()(**batch).loss.backward()
        gradients.append({name: w.grad.clone() for name, w in student.named_parameters() if w.grad is not None})
        student.zero_grad()
        recompute_activations(student)
    assert any("lora_B" in name for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_fused_projections(batch, tokenizer):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**shape, image_size=32, patch_size=8),
        text_config=Phi3Config(**shape, vocab_size=len(tokenizer), pad_token_id=0),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    add_lora(model, 2)
    train(model, batch)
    live = logits(model, batch)
    assert len([name for name in trained_names(model) if "lora_A" in name]) == 4
    merge_lora(model)
    torch.testing.assert_close(logits(model, batch), live, atol=1e-5, rtol=1e-5)


def test_nothing_to_merge_and_two_adapters(student):
    with pytest.raises(ValueError, match="has no LoRA adapters: there is nothing to merge"):
        merge_lora(student)
    add_lora(student, 2)
    with pytest.raises(ValueError, match="has LoRA adapters already: call merge_lora before adding others"):
        add_lora(student, 2)
    merge_lora(student)
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        merge_lora(student)
    with pytest.raises(ValueError, match="has no LoRA adapters: there is nothing to save"):
        save_adapter(student, "nowhere")


@pytest.mark.parametrize("parts", [["language_model", "head"], ["vision"], []])
def test_unknown_parts(student, parts):
    names = re.escape(str(parts))
    with pytest.raises(ValueError, match=f"LoRA is asked for on {names}: name one or more of vision_tower, projector"):
        add_lora(student, 2, parts=parts)
    assert adapted_names(student) == set()


@pytest.mark.parametrize(
    ("parts", "frozen", "whole"),
    [
        (None, ["vision_tower", "projector"], None),
        (None, ["vision_tower"], ["model.multi_modal_projector"]),
        (["language_model"], [], ["model.vision_tower", "model.multi_modal_projector"]),
        (["vision_tower", "projector"], ["language_model"], None),
        (["vision_tower"], ["projector"], ["model.language_model", "lm_head"]),
    ],
)
def test_the_adapters_folder_on_the_start_gives_the_live_logits(tmp_path, student, batch, parts, frozen, whole):
    student.save_pretrained(tmp_path / "start")
    start = LlavaForConditionalGeneration.from_pretrained(tmp_path / "start")
    student = LlavaForConditionalGeneration.from_pretrained(tmp_path / "start")
    freeze(student, frozen)
    add_lora(student, 4, alpha=4, dropout=0.1, parts=parts)
    train(student, batch, steps=2)
    live = logits(student, batch)
    assert (live - logits(start, batch)).abs().max() > 0.05
    save_adapter(student, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(logits(student, batch), live)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == whole
    assert config["base_model_name_or_path"] == str(tmp_path / "start")
    assert config["inference_mode"] is True
    saved = {name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_" not in name}
    assert all(name.startswith(tuple(f"base_model.model.{part}." for part in whole or ["none"])) for name in saved)

    loaded = PeftModel.from_pretrained(start, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), live, atol=1e-6, rtol=1e-6)
    merged = loaded.merge_and_unload()
    merge_lora(student)
    torch.testing.assert_close(logits(merged, batch), logits(student, batch), atol=1e-6, rtol=1e-6)


def stage(name, **train):
    return Stage(name, None, name, None, TrainConfig(**train), own=frozenset({"train"}))


def test_check_lora_leaves_the_student_as_it_is(student):
    freeze(student, ["vision_tower"])
    trained, attributes = trained_names(student), set(vars(student))
    base = {name: weight.clone() for name, weight in student.state_dict().items()}
    state = torch.get_rng_state()
    both = stage("sft", lora_rank=4, lora_parts=("vision_tower", "language_model"))
    check_lora(student, [stage("pretrain"), both, stage("distil", lora_rank=8)])
    assert torch.equal(torch.get_rng_state(), state)
    assert trained_names(student) == trained
    assert set(vars(student)) == attributes
    assert student.state_dict().keys() == base.keys()
    assert all(torch.equal(weight, base[name]) for name, weight in student.state_dict().items())


def test_check_lora_names_the_stage_whose_adapters_cannot_be(student):
    unknown = [stage("pretrain"), stage("sft", lora_rank=4, lora_parts=("head",))]
    with pytest.raises(ValueError, match=r"^sft\.train\.lora_rank is 4, but LoRA does not work here .*\['head'\]"):
        check_lora(student, unknown)
    student.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^train\.lora_rank is 8, but .* NaNs detected"):
        check_lora(student, [replace(stage("distil", lora_rank=8), own=frozenset())])


def test_check_lora_without_peft(student, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    check_lora(student, [stage("distil")])
    with pytest.raises(ValueError, match=r"^pretrain\.train\.lora_rank is 2, but .*ModuleNotFoundError"):
        check_lora(student, [stage("pretrain", lora_rank=2), stage("distil")])
