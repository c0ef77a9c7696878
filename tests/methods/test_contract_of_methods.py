"""What the trainer asks of each method: weighted terms with their graph, a count, its frozen teachers."""

from __future__ import annotations

import pytest
import torch

from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.training.contract import check_method, check_terms


def methods(student, teacher):
    weights = {"align_weight": 0.5, "switch_weight": 2.0, "feature_weight": 0.25}
    return [
        SupervisedMethod(student),
        SwitchKD(student, teacher, feature="cosine", **weights),
        SwitchKD(student, teacher, switch=None, gradient_checkpointing=True),
    ]


def test_every_method_keeps_the_contract(student, teacher, batch):
    for method in methods(student, teacher):
        check_method(method)
        terms = method(**batch)
        check_terms(terms, method)
        assert sum(terms.weighted.values()).item() == pytest.approx(terms.loss.item(), rel=1e-6)
    assert [method.frozen for method in methods(student, teacher)] == [(), ("teacher",), ("teacher",)]


def test_a_weighted_term_is_its_named_one_times_its_weight_and_has_its_own_gradient(student, teacher, batch):
    terms = methods(student, teacher)[1](**batch)
    for name, weight in {"ce": 1.0, "align": 0.5, "switch": 2.0, "feature": 0.25}.items():
        assert terms.weighted[name].item() == pytest.approx(weight * terms.named[name].item(), rel=1e-6)
        assert not terms.named[name].requires_grad
    tower = student.model.vision_tower.embeddings.patch_embedding.weight
    head = student.model.multi_modal_projector.linear_1.weight
    for name, reaches_both in {"ce": True, "align": True, "switch": False, "feature": False}.items():
        gradients = torch.autograd.grad(terms.weighted[name], (tower, head), retain_graph=True, allow_unused=True)
        assert gradients[0].abs().max() > 0, name
        assert (gradients[1] is not None) == reaches_both, name


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_counted_is_what_the_loss_is_a_mean_over(student, teacher, batch, place):
    method = methods(student, teacher)[place]
    sums, means = method(**batch, num_items_in_batch=1), method(**batch)
    assert sums.loss.item() == pytest.approx(means.loss.item() * int(method.count(batch)), rel=1e-5)
    expected = int(method.count(batch))
    batch = {**batch, "labels": batch["labels"].clone()}
    batch["labels"][:, 0] = 5  # nothing stands before it that could say it
    assert int(method.count(batch)) == expected
    batch["labels"][:] = -100
    assert int(method.count(batch)) == 0
