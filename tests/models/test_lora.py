"""LoRA on the language model: what trains, and that the merged model is the live one and stock."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    SiglipVisionConfig,
)

from switchkd.methods import SupervisedMethod
from switchkd.models import freeze
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora, merge_lora

LANGUAGE_MODEL = "model.language_model."


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
    assert not [name for name in set(vars(student)) - attributes if "peft" in name]
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
