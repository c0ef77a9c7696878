"""The term that compares vision features: the cheap rival of the switch."""

from __future__ import annotations

import logging

import pytest
import torch

from switchkd import losses
from switchkd.methods import SwitchKD
from switchkd.models import freeze
from switchkd.models.pathway import pathway_of
from switchkd.models.tiny import random_llava

FEATURES = {"cosine": losses.token_cosine, "relation": losses.token_relation}


def only(name, **options):
    return {"align": None, "switch": None, "feature": name, **options}


@pytest.fixture
def uneven(batch, tokenizer):
    """Two images and an answer of 2 tokens; text alone and 5 tokens; one image and 4: three images in all."""
    image, pad = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    rows = [([image] * 32 + [7, 8], 2), ([10, 11, 12, 13, 14, 15], 5), ([9] + [image] * 16 + [7, 8, 9, 10], 4)]
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = torch.full((3, longest), pad), torch.full((3, longest), -100)
    for row, (tokens, answer) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(tokens) - answer : len(tokens)] = torch.tensor(tokens[-answer:])
    return {
        "input_ids": ids,
        "attention_mask": (ids != pad).long(),
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 32, 32),
    }


@pytest.mark.parametrize("name", FEATURES)
def test_each_image_counts_as_much_as_its_samples_answer_tokens(student, teacher, uneven, name):
    terms = SwitchKD(student, teacher, **only(name, feature_weight=3.0))(**uneven)
    features = [pathway_of(model).encode(uneven["pixel_values"]) for model in (student, teacher)]
    first, second, third = FEATURES[name](*features).tolist()
    expected = (2 * (first + second) / 2 + 5 * 0 + 4 * third) / 11
    assert terms.named.keys() == {"ce", "feature"}
    assert terms.named["feature"].item() == pytest.approx(expected, rel=1e-5)
    assert terms.loss.item() == pytest.approx(terms.named["ce"].item() + 3 * expected, rel=1e-5)


@pytest.mark.parametrize("name", FEATURES)
def test_accumulation_steps_equal_one_large_batch(student, teacher, uneven, name):
    method = SwitchKD(student, teacher, **only(name))
    whole = method(**uneven)
    whole.loss.backward()
    large = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    tokens, images, total = (uneven["labels"] != -100).sum(), [slice(0, 2), None, slice(2, 3)], 0.0
    for row, pictures in enumerate(images):
        part = {key: value[row : row + 1] for key, value in uneven.items() if key != "pixel_values"}
        part["pixel_values"] = None if pictures is None else uneven["pixel_values"][pictures]
        terms = method(**part, num_items_in_batch=tokens)
        terms.loss.backward()
        total += terms.named["feature"].item()
    assert total == pytest.approx(whole.named["feature"].item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, large[name], atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("name", FEATURES)
def test_equal_encoders_start_at_zero_and_move(student, teacher, batch, caplog, name):
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    with caplog.at_level(logging.WARNING):
        method = SwitchKD(student, teacher, **only(name))
    assert "the feature term begins at zero" in caplog.text
    assert method(**batch).named["feature"].abs() < 1e-6
    with torch.no_grad():
        for parameter in student.model.vision_tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert method(**batch).named["feature"] > 1e-4


def test_its_gradient_reaches_the_vision_tower_and_only_the_teachers_tower_runs(student, teacher, batch):
    freeze(student)
    ran = []
    teacher.model.vision_tower.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    teacher.model.language_model.register_forward_hook(lambda *_: ran.append("language model"))
    method = SwitchKD(student, teacher, **only("cosine"))
    method.weights["ce"] = 0.0
    method(**batch).loss.backward()
    assert ran == [False]
    for name, parameter in student.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        in_tower = name.startswith("model.vision_tower") and parameter.requires_grad
        # What is added to all keys of an attention alike changes nothing.
        assert moved == in_tower or name.endswith("k_proj.bias"), name


def test_beside_the_other_terms_the_teachers_tower_runs_once(student, teacher, batch):
    plain = SwitchKD(student, teacher)(**batch).named
    ran = []
    teacher.model.vision_tower.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    named = SwitchKD(student, teacher, feature="relation")(**batch).named
    assert ran == [False]
    assert list(named) == ["ce", "align", "switch", "feature"]
    assert {name: named[name] for name in plain} == plain


def test_an_own_distance(student, teacher, batch):
    def gap(ours, theirs):
        assert ours.requires_grad
        assert not theirs.requires_grad
        return (ours - theirs).pow(2).mean((1, 2))

    value = SwitchKD(student, teacher, **only(gap))(**batch).named["feature"].item()
    ours, theirs = (pathway_of(model).encode(batch["pixel_values"]) for model in (student, teacher))
    tokens = (batch["labels"] != -100).sum(1)
    assert value == pytest.approx(((gap(ours, theirs.detach()) * tokens).sum() / tokens.sum()).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"feature returned shape \(\) for 2 images: it must give one value an image"):
        SwitchKD(student, teacher, **only(lambda ours, theirs: (ours - theirs).mean()))(**batch)


def test_relations_need_no_equal_widths_and_cosines_do(tokenizer, teacher, batch):
    narrow = random_llava(tokenizer, hidden=32, vision_hidden=24, vision_layers=2, image_size=32, patch_size=8)
    features = [pathway_of(model).encode(batch["pixel_values"]) for model in (narrow, teacher)]
    tokens = (batch["labels"] != -100).sum(1)
    expected = (losses.token_relation(*features) * tokens).sum() / tokens.sum()
    named = SwitchKD(narrow, teacher, **only("relation"))(**batch).named
    assert named["feature"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="24 wide .* the feature term needs equal widths; .* switch_adapter"):
        SwitchKD(narrow, teacher, **only("cosine"))


def test_what_cannot_be_compared_is_refused(student, teacher):
    with pytest.raises(ValueError, match="feature is 'cos'; known are cosine, relation, or pass a function"):
        SwitchKD(student, teacher, feature="cos")
    freeze(student, ["vision_tower"])
    with pytest.raises(ValueError, match="the feature term trains the student's vision tower alone"):
        SwitchKD(student, teacher, **only("cosine"))
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    with pytest.raises(ValueError, match="one frozen vision tower.* switch and feature term is exactly zero"):
        SwitchKD(student, teacher, feature="cosine")
