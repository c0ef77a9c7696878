"""What a method offers: its frozen teachers, its count and its terms; and what is refused before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_run import ToyMethod, toy_collate, toy_trainer
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from switchkd import Terms
from switchkd.training import DistillTrainer, checkpoints, zero
from switchkd.training.contract import check_method

# ---- Terms


def test_terms_are_a_sum_of_weighted_parts_with_their_graph():
    a, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
    terms = Terms.of({"a": a * a, "b": b}, {"a": 1.0, "b": 0.5})
    assert terms.loss == 5.5
    assert {name: float(value) for name, value in terms.named.items()} == {"a": 4.0, "b": 3.0}
    assert not any(value.requires_grad for value in terms.named.values())
    assert torch.autograd.grad(terms.weighted["b"], b, retain_graph=True)[0] == 0.5
    assert torch.autograd.grad(terms.loss, a)[0] == 4.0
    assert Terms.of({"a": a * a, "b": b}).loss == 7.0


class Projected(DistillTrainer):
    """Each term's gradient loses its part along the other's before they add up: PCGrad (arXiv 2001.06782), which does
    so where they disagree, for every pair."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.batches, self.sums = [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def backward(self, terms):
        trained = [p for p in self.method.parameters() if p.requires_grad]
        self.sums.append((float(terms.loss.detach()), sum(float(t.detach()) for t in terms.weighted.values())))
        parts = []
        for term in terms.weighted.values():
            found = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
            parts.append(
                torch.cat([(p * 0 if g is None else g).flatten() for p, g in zip(trained, found, strict=True)])
            )
        whole = self.combined(*parts).split([p.numel() for p in trained])
        self.add_gradient({p: g.view_as(p) for p, g in zip(trained, whole, strict=True)})

    def combined(self, a, b):
        return without(a, b) + without(b, a)


class Summed(Projected):
    def combined(self, a, b):
        return a + b


def without(a, b):
    """`a` without its part along `b`."""
    return a - a @ b / (b @ b) * b


def one_step(tmp_path, trainer):
    """The trainer after a step of plain SGD at rate 1, and what its weights moved by: the gradient."""
    settings = {"optim": "sgd", "lr": 1.0, "warmup_ratio": 0.0, "max_grad_norm": 0.0, "steps": 1, "dropout": 0.0}
    folder = tmp_path / trainer.__name__
    run = toy_trainer(folder, trainer=trainer, gradient_accumulation_steps=2, checkpoint_every=0, **settings)
    start = [p.detach().clone() for p in run.method.parameters() if p.requires_grad]
    run.train()
    ends = [p.detach() for p in run.method.parameters() if p.requires_grad]
    return run, torch.cat([(before - after).flatten() for before, after in zip(start, ends, strict=True)])


def test_terms_can_be_taken_apart_and_added_again(tmp_path):
    _, whole = one_step(tmp_path, DistillTrainer)
    taken_apart, summed = one_step(tmp_path, Summed)
    assert len(taken_apart.sums) == 2  # micro-batches
    for loss, total in taken_apart.sums:
        assert loss == pytest.approx(total, rel=1e-6)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)


def test_gradients_are_coordinated_in_each_micro_batch(tmp_path):
    _, whole = one_step(tmp_path, DistillTrainer)
    run, found = one_step(tmp_path, Projected)
    assert (found - whole).abs().max() > 1e-2

    method = toy_trainer(tmp_path / "fresh", dropout=0.0).method.train()
    trained = [p for p in method.parameters() if p.requires_grad]
    count = sum(method.count(batch) for batch in run.batches)
    expected = torch.zeros_like(found)
    for batch in run.batches:
        parts = []
        for name in ("ce", "align"):
            method.zero_grad()
            method(**batch, num_items_in_batch=count).weighted[name].backward()
            parts.append(torch.cat([(p * 0 if p.grad is None else p.grad).flatten() for p in trained]))
        a, b = parts
        expected += without(a, b) + without(b, a)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda terms: Terms(loss=terms.loss, named=terms.named), "without named or weighted terms"),
        (lambda terms: {"loss": terms.loss}, "ToyMethod returned dict without"),
        (lambda terms: Terms(2 * terms.loss, terms.named, terms.weighted), "and weighted terms that sum to"),
        (lambda terms: Terms(terms.loss, {"ce": terms.loss}, terms.weighted), r"named \['ce'\] and weighted"),
    ],
)
def test_terms_that_do_not_make_up_the_loss_end_the_run_at_once(tmp_path, monkeypatch, returned, message):
    forward = ToyMethod.forward

    def other(self, input_ids, attention_mask, pixel_values, labels, num_items_in_batch=None):
        return returned(forward(self, input_ids, attention_mask, pixel_values, labels, num_items_in_batch))

    monkeypatch.setattr(ToyMethod, "forward", other)
    trainer = toy_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- The count


def test_labels_at_the_first_place_are_not_counted(tmp_path):
    trainer = toy_trainer(tmp_path)
    batch = toy_collate([trainer.train_dataset[0], trainer.train_dataset[1]])
    expected = trainer.method.count(batch)
    batch["labels"][:, 0] = 7  # no token stands before it that could say it
    assert trainer._get_num_items_in_batch([batch, batch], "cpu") == 2 * expected > 0
    batch["labels"][:] = -100
    assert trainer._get_num_items_in_batch([batch], "cpu") == 1  # a step without items gives 0, not a division by it


# ---- What is refused


class TwoTeachers(ToyMethod):
    frozen = ("teacher", "tutor")

    def __init__(self):
        super().__init__()
        self.tutor = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if hasattr(self, "tutor"):
            self.tutor.eval()
        return self


def test_several_teachers_stay_out_of_the_state():
    method = TwoTeachers()
    check_method(method)
    names = checkpoints.method_state(method)
    assert names
    assert not [name for name in names if name.startswith(("teacher", "tutor"))]
    method.register_buffer("teacher_memory", torch.zeros(1))  # only begins like one
    assert "teacher_memory" in checkpoints.method_state(method)
    state = method.state_dict()
    checkpoints.drop_frozen(method, state)
    assert state.keys() == {name for name in method.state_dict() if not name.startswith(("teacher.", "tutor."))}


def test_what_deepspeed_saves_has_no_teacher_and_the_method_is_as_before():
    class Engine:
        def save_checkpoint(self, folder, exclude_frozen_parameters):
            self.saved = {**method.state_dict()}, exclude_frozen_parameters

    method, engine = TwoTeachers(), Engine()
    before = list(method.state_dict())
    assert "tutor.1.running_mean" in before
    zero.save_engine(engine, method, "nowhere")
    assert list(engine.saved[0]) == [name for name in before if not name.startswith(("teacher.", "tutor."))]
    assert engine.saved[1]
    assert list(method.state_dict()) == before


def refused(method, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the tests look at the message
        DistillTrainer(method, TrainingArguments(str(tmp_path), use_cpu=True), data_collator=toy_collate)
    return str(error.value)


def test_a_frozen_child_that_would_train_is_refused(tmp_path):
    method = TwoTeachers()
    method.tutor[0].weight.requires_grad_(True)
    assert "TwoTeachers.frozen names 'tutor', of which 1 parameters would be trained (0.weight" in refused(
        method, tmp_path
    )
    method = ToyMethod()
    method.teacher.requires_grad_(True)
    assert "ToyMethod.frozen names 'teacher', of which" in refused(method, tmp_path)


def test_a_teacher_that_is_thawed_later_is_refused_when_training_begins(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.method.teacher.requires_grad_(True)
    with pytest.raises(ValueError, match="ToyMethod.frozen names 'teacher', of which"):
        trainer.train()


def test_a_frozen_child_in_training_mode_is_refused_and_the_mode_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyMethod, "train", nn.Module.train)
    method = ToyMethod().eval()
    assert "ToyMethod.train() puts 'teacher' in training mode" in refused(method, tmp_path)
    assert not method.training


def test_each_frozen_child_is_looked_at(tmp_path, monkeypatch):
    method = TwoTeachers()
    monkeypatch.setattr(TwoTeachers, "train", ToyMethod.train)
    assert "TwoTeachers.train() puts 'tutor' in training mode" in refused(method, tmp_path)


@pytest.mark.parametrize("frozen", [None, "teacher"])
def test_frozen_has_to_be_names(tmp_path, monkeypatch, frozen):
    monkeypatch.setattr(ToyMethod, "frozen", frozen)
    assert f"ToyMethod.frozen is {frozen!r}: name its children" in refused(ToyMethod(), tmp_path)


@pytest.mark.parametrize("name", ["techer", "student"])
def test_frozen_names_a_child_beside_the_student(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ToyMethod, "frozen", ("teacher", name))
    message = refused(ToyMethod(), tmp_path)
    assert message == (
        f"ToyMethod.frozen names {name!r}: its children beside the student are ['teacher', 'temperature']"
    )


def test_method_without_token_normalisation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyMethod, "forward", lambda self, input_ids, labels: None)
    assert "ToyMethod.forward takes no num_items_in_batch" in refused(ToyMethod(), tmp_path)


@pytest.mark.parametrize("name", ["count", "progress"])
def test_method_without_a_part_of_the_contract_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.delattr(ToyMethod, name)
    assert f"ToyMethod has no {name}" in refused(ToyMethod(), tmp_path)


def test_method_without_student_is_refused(tmp_path):
    method = ToyMethod()
    del method.student
    assert "ToyMethod has no student" in refused(method, tmp_path)


def test_student_that_cannot_be_exported_is_refused(tmp_path):
    method = ToyMethod()
    method.student = nn.Linear(1, 1)
    assert "ToyMethod.student is a Linear without save_pretrained" in refused(method, tmp_path)


def test_recomputed_layers_of_a_teacher_may_say_training(tmp_path, monkeypatch):
    method = ToyMethod()
    layers = [each for each in method.teacher.modules() if isinstance(each, GradientCheckpointingLayer)]
    assert layers
    method.teacher.eval()
    monkeypatch.setattr(
        ToyMethod, "train", lambda self, mode=True: [setattr(each, "training", mode) for each in layers]
    )
    check_method(method)
    layers[0].self_attn.training = True  # its dropout
    assert "ToyMethod.train() puts 'teacher' in training mode" in refused(method, tmp_path)
