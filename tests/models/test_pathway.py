from typing import get_args

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from switchkd.methods import SwitchKD
from switchkd.models.config import Part
from switchkd.models.pathway import pathway_of

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def llava(vision, layer, strategy):
    text = Qwen2Config(**{**SIZES, "num_key_value_heads": 2}, vocab_size=120)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_token_index=3,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("config", "layer", "strategy"),
    [
        (SiglipVisionConfig, -2, "full"),
        (SiglipVisionConfig, -1, "full"),
        (CLIPVisionConfig, -2, "default"),
        (CLIPVisionConfig, [-3, -1], "default"),
    ],
)
def test_the_four_steps_are_the_models_own_forward(config, layer, strategy):
    model = llava(config(**SIZES, image_size=32, patch_size=8), layer, strategy)
    path = pathway_of(model)
    ids = torch.tensor([[5, *[3] * 16, 7, 8, 0, 0], [9, 10, *[3] * 16, 11, 12, 13]])
    mask = torch.tensor([[1] * 19 + [0] * 2, [1] * 21])
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = path.head(path.decode(ids, mask, path.project(path.encode(pixels))))
        stock = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert torch.allclose(ours[mask.bool()], stock[mask.bool()], atol=1e-5)


def test_image_tokens_and_visual_tokens_must_be_equally_many(student, batch):
    path = pathway_of(student)
    tokens = path.project(path.encode(batch["pixel_values"][:1]))
    with pytest.raises(
        ValueError, match=r"hold 32 image tokens \(id 3\) but the 1 images give 16 visual tokens: encode"
    ):
        path.decode(batch["input_ids"], batch["attention_mask"], tokens)


def test_without_images_the_tower_stays_in_the_graph(student):
    ids = torch.tensor([[5, 6, 7]])
    path = pathway_of(student)
    tokens = path.project(path.encode(path.blank_pixels(like=ids)))
    hidden = path.decode(ids, None, tokens, blank=True)
    hidden.sum().backward()
    weight = student.model.vision_tower.embeddings.patch_embedding.weight
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0
    assert torch.allclose(path.head(hidden), student(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "strategy", "tokens"),
    [
        (SiglipVisionConfig, "full", 16),
        (SiglipVisionConfig, "default", 15),
        (CLIPVisionConfig, "full", 17),
        (CLIPVisionConfig, "default", 16),
    ],
)
def test_the_visual_tokens_of_an_image_are_what_encode_gives(config, strategy, tokens):
    model = llava(config(**SIZES, image_size=32, patch_size=8), -2, strategy)
    assert pathway_of(model).visual_token_count == tokens
    assert pathway_of(model).encode(torch.randn(1, 3, 32, 32)).shape[1] == tokens


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("images", [True, False])
def test_a_bfloat16_teacher_reads_a_float32_students_features(student, teacher, batch, autocast, images):
    if not images:
        keep = batch.pop("input_ids") != student.config.image_token_id
        batch = {"input_ids": torch.full(keep.shape, 5), "labels": batch["labels"], "attention_mask": keep.long()}
    patches = student.model.vision_tower.embeddings.patch_embedding.weight

    def run():
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms = SwitchKD(student, teacher, switch="forward_kl", align="forward_kl")(**batch)
        terms.loss.backward()
        return {name: value.item() for name, value in terms.named.items()}, patches.grad.clone()

    (terms, gradient), _ = run(), teacher.bfloat16()
    half_terms, half_gradient = run()
    assert half_terms == pytest.approx(terms, rel=0.02, abs=2e-3)
    assert half_gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half_gradient.flatten(), gradient.flatten(), dim=0) > 0.9 or not images
    assert all(weight.grad is None for weight in teacher.parameters())


def test_autocast_projects_as_before(student, batch):
    features = torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            expected = student.model.multi_modal_projector(features.to(dtype))
            assert torch.equal(pathway_of(student).project(features.to(dtype)), expected)


def test_the_parts_and_the_head_are_all_of_the_model(student):
    path = pathway_of(student)
    parts = [*map(path.part, path.parts), path.head]
    assert {id(weight) for part in parts for weight in part.parameters()} == {id(w) for w in student.parameters()}
    assert list(path.parts) == list(get_args(Part))  # what a configuration calls them


@pytest.mark.parametrize("kind", ["language model alone", "another family"])
def test_a_model_of_no_known_family_is_refused(student, kind):
    model = student.model.language_model
    if kind == "another family":
        model = student
        model.config.model_type = "paligemma"
    with pytest.raises(ValueError, match=f"'{model.config.model_type}'; known families are llava"):
        pathway_of(model)
