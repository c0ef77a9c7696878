from __future__ import annotations

import math

import pytest
import torch

from switchkd.losses import image_weights, token_cosine, token_relation

LOSSES = [token_cosine, token_relation]


def test_cosine_of_each_token_by_hand():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 0.0]]])
    teacher = torch.tensor([[[5.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    expected = [(0 + 1) / 2, (1 - math.sqrt(0.5) + 2) / 2]
    torch.testing.assert_close(token_cosine(student, teacher), torch.tensor(expected))


def test_relation_of_tokens_by_hand():
    # Student's tokens at right angles, [[1, 0], [0, 1]]; the teacher's at 60 degrees, [[1, 0.5], [0.5, 1]].
    student = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [0.5, math.sqrt(0.75), 0.0]]])
    expected = 1 - 2 / (math.sqrt(2) * math.sqrt(2.5))
    torch.testing.assert_close(token_relation(student, teacher), torch.tensor([expected]))


def test_relations_do_not_change_when_all_features_are_turned():
    features = torch.randn(3, 5, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert token_relation(features @ turn, features).abs().max() < 1e-6
    assert token_cosine(features @ turn, features).min() > 0.1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_equal_features_cost_nothing_and_others_do(loss, autocast):
    student, teacher = torch.randn(2, 3, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert loss(teacher, teacher).abs().max() < 1e-6
        assert loss(teacher.bfloat16(), teacher).abs().max() < 1e-4
        value = loss(student.requires_grad_(), teacher)
    assert value.shape == (3,)
    assert value.dtype == torch.float32
    assert value.min() > 0.01
    value.sum().backward()
    assert (student.grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_features_have_finite_gradients(loss):
    student = torch.zeros(1, 4, 8, requires_grad=True)
    loss(student, torch.randn(1, 4, 8)).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("loss", "shape", "rule"),
    [
        (token_cosine, (2, 4, 6), "of one shape"),
        (token_relation, (2, 5, 8), "of equally many images and tokens"),
        (token_relation, (4, 8), "of equally many images and tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_named(loss, shape, rule):
    with pytest.raises(
        ValueError, match=rf"are \({', '.join(map(str, shape))}\) and the teacher's \(2, 4, 8\).*{rule}"
    ):
        loss(torch.randn(shape), torch.randn(2, 4, 8))


def test_an_image_counts_as_much_as_its_sample_has_answer_tokens_over_its_images():
    labels = torch.tensor([[-100, -100, 5, 6, 7], [-100, 4, -100, 6, -100], [-100, -100, -100, -100, 9]])
    assert image_weights(labels, torch.tensor([2, 0, 1])).tolist() == [1.5, 1.5, 1.0]
    assert image_weights(labels, torch.tensor([0, 0, 0])).tolist() == []
