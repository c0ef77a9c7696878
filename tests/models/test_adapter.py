from __future__ import annotations

import pytest
import torch
from torch import nn

from switchkd.models import adapter as adapters
from switchkd.models.adapter import LinearAdapter, fit_switch_adapter
from switchkd.models.pathway import LlavaPathway, pathway_of
from switchkd.models.tiny import random_llava

SHAPE = {"hidden": 32, "vision_layers": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture
def narrow(tokenizer):
    return random_llava(tokenizer, vision_hidden=24, **SHAPE)


@pytest.fixture
def pictures():
    return [torch.randn(4, 3, 32, 32) for _ in range(3)]


@pytest.fixture
def planted(monkeypatch, narrow, teacher):
    """The map that the teacher's features are of the student's, as long as the test lasts."""
    truth = nn.Linear(24, 32)
    encode = LlavaPathway.encode

    def encoded(path, pixels):
        return truth(encode(pathway_of(narrow), pixels)) if path.model is teacher else encode(path, pixels)

    monkeypatch.setattr(LlavaPathway, "encode", encoded)
    return truth


def test_a_planted_map_is_found_again(planted, narrow, teacher, pictures):
    fitted = fit_switch_adapter(narrow, teacher, pictures)
    assert fitted.r2 == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(fitted.linear.weight, planted.weight, atol=2e-3, rtol=0)
    with torch.no_grad():
        features = pathway_of(narrow).encode(pictures[0])
        torch.testing.assert_close(fitted(features), planted(features), atol=1e-4, rtol=0)
    assert fitted.linear.weight.dtype == torch.float32
    assert fitted.linear.weight.requires_grad


def test_the_fit_is_least_squares_with_a_bias_whatever_the_batches(narrow, teacher, pictures):
    fitted = fit_switch_adapter(narrow, teacher, pictures, ridge=0.0)
    with torch.no_grad():
        ours, theirs = (
            torch.cat([pathway_of(model).encode(batch).flatten(0, 1) for batch in pictures]).double()
            for model in (narrow, teacher)
        )
    design = torch.cat([ours, torch.ones_like(ours[:, :1])], dim=1)
    solved = torch.linalg.lstsq(design, theirs).solution
    residual = ((theirs - design @ solved) ** 2).sum() / ((theirs - theirs.mean(0)) ** 2).sum()
    torch.testing.assert_close(fitted.linear.weight.double(), solved[:-1].mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fitted.linear.bias.double(), solved[-1], atol=1e-4, rtol=1e-4)
    assert 0.0 < fitted.r2 < 0.999
    assert fitted.r2 == pytest.approx(1 - residual.item(), abs=1e-6)
    at_once = fit_switch_adapter(narrow, teacher, [torch.cat(pictures)], ridge=0.0)
    torch.testing.assert_close(at_once.linear.weight, fitted.linear.weight, atol=1e-4, rtol=1e-4)


def test_the_fit_repeats_itself_and_leaves_the_towers_as_they_were(narrow, teacher, pictures):
    narrow.train()
    narrow.config.vision_config.attention_dropout = 0.5
    for layer in narrow.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    first, second = (fit_switch_adapter(narrow, teacher, pictures) for _ in range(2))
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert torch.equal(first.linear.bias, second.linear.bias)
    assert narrow.model.vision_tower.training
    assert all(p.grad is None for p in (*narrow.parameters(), *teacher.parameters()))


def test_a_bfloat16_teacher_is_fitted_in_float64(narrow, teacher, pictures):
    full = fit_switch_adapter(narrow, teacher, pictures)
    half = fit_switch_adapter(narrow, teacher.bfloat16(), pictures)
    assert half.r2 == pytest.approx(full.r2, abs=0.02)
    assert half.linear.weight.dtype == torch.float32


def test_fewer_pictures_than_the_width_needs_still_give_a_finite_map(tokenizer, teacher):
    wide = random_llava(tokenizer, vision_hidden=48, **SHAPE)
    fitted = fit_switch_adapter(wide, teacher, [torch.randn(1, 3, 32, 32)])  # 16 tokens for 48 features
    assert torch.isfinite(fitted.linear.weight).all()
    assert fitted.r2 > 0.99


def test_what_cannot_be_fitted_is_said(narrow, teacher, pictures):
    with pytest.raises(ValueError, match="the samples hold none: drop switch_adapter"):
        fit_switch_adapter(narrow, teacher, [])
    with torch.no_grad():
        teacher.model.vision_tower.embeddings.patch_embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="variance of the teacher's vision features is nan"):
        fit_switch_adapter(narrow, teacher, pictures)


@pytest.mark.parametrize(("source", "target"), [(4, 2), (2, 4), (6, 4), (27, 24)])
def test_resampling_keeps_even_fields_and_where_things_are(source, target):
    weights = adapters._resampling(source, target)
    assert weights.shape == (target**2, source**2)
    torch.testing.assert_close(weights.sum(1), torch.ones(target**2))
    centres = (torch.arange(source) + 0.5) / source
    expected = (torch.arange(target) + 0.5) / target
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    field = (weights @ torch.stack([rows, columns], -1).flatten(0, 1)).view(target, target, 2)
    cell = 1 / max(source, target)
    error = torch.maximum((field[..., 0] - expected[:, None]).abs(), (field[..., 1] - expected).abs())
    assert error.max() <= cell / 2 + 1e-6  # at the rim there is nothing beyond to average
    assert error[1:-1, 1:-1].numel() == 0 or error[1:-1, 1:-1].max() < cell / 10


def test_a_coarser_grid_is_the_average_of_what_it_covers():
    adapter = LinearAdapter(3, 3, 16, 4)
    torch.nn.init.eye_(adapter.linear.weight)
    torch.nn.init.zeros_(adapter.linear.bias)
    features = torch.zeros(1, 16, 3)
    features[0, [0, 1, 4, 5]] = 1.0  # the upper left quarter
    means = adapter(features)[0, :, 0].detach()
    assert means[0] > 0.7
    assert means[1] == pytest.approx(means[2].item())
    assert means[0] > 3 * means[1] > 3 * means[3]
    assert means.sum() == pytest.approx(1.0, abs=1e-5)


def test_no_resampling_between_equal_grids_and_no_buffer_in_the_state():
    assert LinearAdapter(8, 4, 15, 15).resampling is None
    assert set(LinearAdapter(8, 4, 16, 4).state_dict()) == {"linear.weight", "linear.bias"}


def test_a_number_of_tokens_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="the student gives 17 visual tokens, which are no square grid"):
        LinearAdapter(8, 4, 17, 16)
    with pytest.raises(ValueError, match="the teacher gives 15 visual tokens, which are no square grid"):
        LinearAdapter(8, 4, 16, 15)


def test_between_reads_the_pair(tokenizer, narrow, teacher):
    coarse = random_llava(tokenizer, vision_hidden=24, **(SHAPE | {"patch_size": 16}))
    assert LinearAdapter.between(narrow, teacher)(torch.randn(2, 16, 24)).shape == (2, 16, 32)
    assert LinearAdapter.between(coarse, teacher)(torch.randn(2, 4, 24)).shape == (2, 16, 32)
