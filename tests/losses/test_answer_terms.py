from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switchkd.losses import answer_rows, answer_terms, dbild_loss, forward_kl

ROWS, WIDTH, TEACHER_WIDTH, VOCAB, TEACHER_VOCAB, SHARED = 23, 6, 10, 50, 53, 47


class Head(nn.Module):
    """A head as sharding wraps it: callable, its weight out of reach; counts calls and rows."""

    def __init__(self, width: int, vocab: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(width, vocab, bias=False)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, hidden):
        self.calls.append((len(hidden), torch.is_grad_enabled()))
        return self.inner(hidden)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    teacher_head = Head(TEACHER_WIDTH, TEACHER_VOCAB, 1).requires_grad_(False)
    return {
        "student_hidden": torch.randn(ROWS, WIDTH, generator=generator).requires_grad_(),
        "student_head": Head(WIDTH, VOCAB, 0),
        "labels": torch.randint(VOCAB, (ROWS,), generator=generator),
        "teacher_hidden": 4 * torch.randn(ROWS, TEACHER_WIDTH, generator=generator),
        "switch_hidden": (4 * torch.randn(ROWS, TEACHER_WIDTH, generator=generator)).requires_grad_(),
        "teacher_head": teacher_head,
        "align": dbild_loss,
        "switch": functools.partial(forward_kl, temperature=2.0),
        "shared_vocab": SHARED,
    }


def plain_terms(inputs) -> dict[str, torch.Tensor]:
    """Every logit at once, no chunk, no checkpoint."""
    student = inputs["student_head"].inner(inputs["student_hidden"])
    teacher = inputs["teacher_head"].inner(inputs["teacher_hidden"])[:, :SHARED]
    switch = inputs["teacher_head"].inner(inputs["switch_hidden"])[:, :SHARED]
    return {
        "ce": nn.functional.cross_entropy(student, inputs["labels"], reduction="sum"),
        "align": inputs["align"](student[:, :SHARED], teacher).sum(),
        "switch": inputs["switch"](switch, teacher).sum(),
    }


def leaves(inputs):
    return inputs["student_hidden"], inputs["student_head"].inner.weight, inputs["switch_hidden"]


@pytest.mark.parametrize("chunk", [1, 5, 23, 1024])
def test_chunked_equals_plain_in_value_and_gradient(inputs, chunk):
    chunked, plain = answer_terms(**inputs, chunk=chunk), plain_terms(inputs)
    assert list(chunked) == ["ce", "align", "switch"]
    for name, value in plain.items():
        assert chunked[name].shape == ()
        assert value > 1
        torch.testing.assert_close(chunked[name], value)
        gradients = [
            torch.autograd.grad(terms[name], leaves(inputs), retain_graph=True, allow_unused=True)
            for terms in (chunked, plain)
        ]
        for ours, expected in zip(*gradients, strict=True):
            assert (ours is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(ours, expected)


def test_each_term_moves_its_own_side_alone(inputs):
    terms = answer_terms(**inputs, chunk=5)
    for name, moves in (
        ("ce", [True, True, False]),
        ("align", [True, True, False]),
        ("switch", [False, False, True]),
    ):
        gradients = torch.autograd.grad(terms[name], leaves(inputs), retain_graph=True, allow_unused=True)
        assert [g is not None for g in gradients] == moves, name
        assert all(g.abs().max() > 0 for g in gradients if g is not None)


def test_a_teacher_with_a_graph_gets_no_gradient(inputs):
    inputs["teacher_hidden"].requires_grad_()
    inputs["teacher_head"].requires_grad_(True)
    inputs["switch"] = None
    sum(answer_terms(**inputs).values()).backward()
    assert inputs["teacher_hidden"].grad is None
    assert inputs["teacher_head"].inner.weight.grad is None


def test_heads_are_called_once_a_chunk_for_each_kind_of_row(inputs):
    terms = answer_terms(**inputs, chunk=6)
    sizes = [6, 6, 6, 5]
    assert inputs["student_head"].calls == [(n, True) for n in sizes]
    assert inputs["teacher_head"].calls == [call for n in sizes for call in ((n, False), (n, True))]
    sum(terms.values()).backward()
    # Once more on the way back, where a chunk's logits are made again, but for the last, whose logits are still there.
    assert inputs["student_head"].calls[4:] == [(6, True)] * 3


def test_heads_are_called_for_nothing_else(inputs):
    inputs |= {"align": None, "switch": None}
    assert list(answer_terms(**inputs)) == ["ce"]
    assert inputs["teacher_head"].calls == []
    inputs["align"] = dbild_loss
    assert list(answer_terms(**inputs)) == ["ce", "align"]
    assert inputs["teacher_head"].calls == [(ROWS, False)]


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def test_no_tensor_beyond_a_chunk_of_logits_is_made_or_saved(inputs):
    inputs["align"] = functools.partial(dbild_loss, candidates=8)  # few, as against a real vocabulary
    saved = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t),
    ):
        terms = answer_terms(**inputs, chunk=12)
        # Of the first chunk its hidden states, to make its logits again; of the last, 11 rows, the logits.
        assert max(saved) <= 11 * TEACHER_VOCAB
        assert sum(numel >= 12 * SHARED for numel in saved) == 0
        sum(terms.values()).backward()
    assert largest.numel == 12 * TEACHER_VOCAB
    assert largest.numel < ROWS * SHARED


@pytest.mark.parametrize("min_chunks", [1, 3])
def test_no_rows_give_zero_and_still_reach_the_graph(inputs, min_chunks):
    for name in ("student_hidden", "labels", "teacher_hidden", "switch_hidden"):
        inputs[name] = inputs[name].detach()[:0]
    inputs["student_hidden"].requires_grad_()
    inputs["switch_hidden"].requires_grad_()
    terms = answer_terms(**inputs, min_chunks=min_chunks)
    assert {name: value.item() for name, value in terms.items()} == {"ce": 0, "align": 0, "switch": 0}
    assert len(inputs["student_head"].calls) == min_chunks
    sum(terms.values()).backward()
    assert torch.equal(inputs["student_head"].inner.weight.grad, torch.zeros(VOCAB, WIDTH))
    assert inputs["switch_hidden"].grad.shape == (0, TEACHER_WIDTH)


def test_min_chunks_runs_empty_chunks_and_changes_no_sum(inputs):
    expected = answer_terms(**inputs)
    inputs["student_head"].calls.clear()
    terms = answer_terms(**inputs, min_chunks=30)
    assert [rows for rows, _ in inputs["student_head"].calls] == [1] * 23 + [0] * 7
    torch.testing.assert_close(terms, expected)


def test_works_without_a_graph(inputs):
    with torch.no_grad():
        terms = answer_terms(**inputs, chunk=5)
    torch.testing.assert_close(terms, {name: value.detach() for name, value in plain_terms(inputs).items()})


def test_answer_rows_keeps_the_position_before_each_answer_token():
    hidden = torch.arange(10.0).view(2, 5, 1)
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 3, -100, -100, 4]])
    rows, targets = answer_rows(hidden, labels)
    assert rows.flatten().tolist() == [1, 2, 5, 8]
    assert targets.tolist() == [7, 8, 3, 4]


def test_a_one_word_answer_is_in_the_loss():
    # Hidden states are logits already; the one before the answer knows it.
    vocab, answer = 11, 9
    labels = torch.tensor([[-100, -100, -100, answer]])
    hidden = torch.zeros(1, 4, vocab)
    hidden[0, 2, answer] = 5.0
    rows, targets = answer_rows(hidden.requires_grad_(), labels)
    assert targets.tolist() == [answer]
    terms = answer_terms(rows, nn.Identity(), targets)
    assert terms["ce"].item() == pytest.approx(math.log(math.exp(5) + 10) - 5, rel=1e-5)
    terms["ce"].backward()
    assert hidden.grad[0].abs().amax(-1).gt(0).tolist() == [False, False, True, False]


def test_answer_rows_of_a_batch_without_answers_stay_in_the_graph():
    hidden = torch.randn(2, 4, WIDTH, requires_grad=True)
    rows, targets = answer_rows(hidden, torch.full((2, 4), -100))
    assert rows.shape == (0, WIDTH)
    assert targets.shape == (0,)
    answer_terms(rows, Head(WIDTH, VOCAB, 0), targets)["ce"].backward()
    assert torch.equal(hidden.grad, torch.zeros(2, 4, WIDTH))


def test_answer_rows_of_shapes_that_differ():
    with pytest.raises(ValueError, match=r"hidden is \(2, 5, 6\) and labels \(2, 4\)"):
        answer_rows(torch.zeros(2, 5, 6), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hidden": None}, "pass teacher_hidden and teacher_head"),
        ({"teacher_head": None}, "pass teacher_hidden and teacher_head"),
        ({"switch_hidden": None}, "switch is set but switch_hidden is None"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels has 4 rows and student_hidden 23"),
        (
            {"teacher_hidden": torch.zeros(22, TEACHER_WIDTH)},
            "teacher_hidden has 22 rows and student_hidden 23",
        ),
        (
            {"switch_hidden": torch.zeros(24, TEACHER_WIDTH)},
            "switch_hidden has 24 rows and student_hidden 23",
        ),
        (
            {"shared_vocab": None},
            "align: the student's head gives 50 logits and the teacher's 53: pass shared_vocab",
        ),
        (
            {"shared_vocab": 51},
            "align: shared_vocab is 51, but the student's head gives 50 logits .* teacher's 53",
        ),
        (
            {"align": None, "shared_vocab": 54},
            "switch: shared_vocab is 54, .* gives 53 logits and the teacher's 53",
        ),
        ({"teacher_head": Head(TEACHER_WIDTH, 30, 1)}, "shared_vocab is 47, .* teacher's 30"),
        ({"shared_vocab": 0}, "shared_vocab is 0; at least 1 token"),
        ({"chunk": 0}, "chunk is 0; a chunk holds at least 1 row"),
        (
            {"align": lambda s, t: forward_kl(s, t).mean()},
            r"align returned shape \(\) for 23 rows: .* shape \(23,\)",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        answer_terms(**(inputs | changes))
