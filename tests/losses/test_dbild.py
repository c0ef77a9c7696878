from __future__ import annotations

import math

import pytest
import torch
from pair_form import pair_form

from switchkd.losses import bild_loss, dbild_loss, knee


def logits(rows: int, width: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    """Peaked rows, as a language model gives them: cubed normals."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) ** 3 * scale


def masked(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """-inf at random places; the last row keeps two entries at most, the one before it one."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.3, -math.inf)
    rows[-1, 2:] = -math.inf
    rows[-2, 1:] = -math.inf
    return rows


CASES = {
    "random": (logits(8, 90, 0), logits(8, 90, 1)),
    "close": (logits(8, 90, 0), logits(8, 90, 0) + 0.01 * logits(8, 90, 1)),
    "tied": (logits(8, 50, 2).round(), logits(8, 50, 3).round()),
    "masked": (masked(logits(8, 90, 4), 4), masked(logits(8, 90, 5), 5)),
    "extreme": (logits(8, 90, 6).sign() * 1e4, logits(8, 90, 7, 1e3).clamp(-1e4, 1e4)),
    "narrow": (logits(8, 5, 8), logits(8, 5, 9)),
}


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("case", CASES)
def test_dbild_equals_the_form_with_stored_pairs_in_value_and_gradient(case, direction):
    student, teacher = CASES[case]
    student = student.clone().requires_grad_()
    loss = dbild_loss(student, teacher, direction=direction)
    expected = pair_form(student, teacher, direction=direction)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(0.5, 2.0, len(loss))
    (gradient,) = torch.autograd.grad((loss * weights).sum(), student, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    assert gradient.isfinite().all()
    assert case == "extreme" or gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"candidates": 12}, {"k_min": 5}, {"k_max": 4}, {"temperature": 0.7}])
def test_options_reach_the_loss(options):
    student, teacher = CASES["random"]
    loss = dbild_loss(student, teacher, **options)
    torch.testing.assert_close(loss.double(), pair_form(student, teacher, **options), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loss, dbild_loss(student, teacher))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_bild_equals_the_form_with_stored_pairs(direction):
    for case in ("random", "masked", "narrow"):
        student = CASES[case][0].clone().requires_grad_()
        teacher = CASES[case][1]
        loss = bild_loss(student, teacher, direction=direction)
        expected = pair_form(student, teacher, candidates=8, fixed_k=8, direction=direction)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_bild_is_forward_and_dbild_reverse_unless_told():
    student, teacher = CASES["random"]
    assert torch.equal(bild_loss(student, teacher), bild_loss(student, teacher, direction="forward"))
    assert torch.equal(dbild_loss(student, teacher), dbild_loss(student, teacher, direction="reverse"))
    assert not torch.allclose(bild_loss(student, teacher), bild_loss(student, teacher, direction="reverse"))


# Three tokens, temperature 1, logits the logs of small integers: a pair's weight is a ratio of integers.
# Teacher 4, 2, 1: pairs 4/2, 4/1, 2/1 -> 1/4, 1/2, 1/4.
TEACHER = torch.tensor([[4.0, 2.0, 1.0]]).log()


def test_direction_by_hand():
    # Student 6, 3, 1 leads in the same order, so both sides are alike: pairs 2, 6, 3 -> 2/11, 6/11, 3/11.
    student = torch.tensor([[6.0, 3.0, 1.0]]).log()
    reverse = 2 / 11 * math.log(8 / 11) + 6 / 11 * math.log(12 / 11) + 3 / 11 * math.log(12 / 11)
    forward = 1 / 4 * math.log(11 / 8) + 1 / 2 * math.log(11 / 12) + 1 / 4 * math.log(11 / 12)
    assert reverse == pytest.approx(0.013290, abs=1e-6)
    assert forward == pytest.approx(0.014355, abs=1e-6)
    assert dbild_loss(student, TEACHER, temperature=1.0).item() == pytest.approx(2 * reverse, rel=1e-5)
    loss = dbild_loss(student, TEACHER, temperature=1.0, direction="forward")
    assert loss.item() == pytest.approx(2 * forward, rel=1e-5)
    squared = dbild_loss(student * 2, TEACHER * 2, temperature=2.0, temperature_squared=True)
    assert squared.item() == pytest.approx(4 * 2 * reverse, rel=1e-5)


def test_triangle_order_by_hand():
    # Student 1, 3, 6: the teacher's order runs up the student's row.
    #   teacher-led: student pairs 1/3, 1/6, 3/6 -> 1/3, 1/6, 1/2 against 1/4, 1/2, 1/4
    #   student-led (6, 3, 1): 2/11, 6/11, 3/11 against the teacher's 1/2, 1/4, 2/4 -> 2/5, 1/5, 2/5
    student = torch.tensor([[1.0, 3.0, 6.0]]).log()
    teacher_led = 1 / 3 * math.log(4 / 3) + 1 / 6 * math.log(1 / 3) + 1 / 2 * math.log(2)
    student_led = 2 / 11 * math.log(5 / 11) + 6 / 11 * math.log(30 / 11) + 3 / 11 * math.log(15 / 22)
    loss = dbild_loss(student, TEACHER, temperature=1.0)
    assert loss.item() == pytest.approx(teacher_led + student_led, rel=1e-5)


def test_equal_logits_cost_nothing_and_pull_nowhere():
    for rows in (CASES["random"][0], CASES["extreme"][1], CASES["masked"][0]):
        student = rows.clone().requires_grad_()
        loss = dbild_loss(student, rows)
        assert torch.equal(loss, torch.zeros(len(rows)))
        loss.sum().backward()
        assert student.grad.abs().max() < 1e-7


def test_a_constant_added_to_a_row_changes_nothing():
    student, teacher = (rows.double() for rows in CASES["random"])
    loss = dbild_loss(student, teacher)
    torch.testing.assert_close(dbild_loss(student + 7.0, teacher - 40.0), loss)
    assert loss.min() > 1e-3


def test_k_of_two_is_silent_and_k_of_three_is_not():
    # One dominant logit over a flat tail: the knee is at 2, one pair, a softmax over one value.
    tail = 1e-3 * logits(2, 40, 10, 1.0)
    student, teacher = (row[None] + 20.0 * (torch.arange(40) == 3) for row in tail)
    for rows in (student, teacher):
        assert knee(rows.sort(descending=True).values).item() == 2
    student.requires_grad_()
    silent = dbild_loss(student, teacher + torch.arange(40) * 1e-3, k_min=2)
    silent.sum().backward()
    assert silent.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))
    heard = dbild_loss(student, teacher - 10.0 * (torch.arange(40) == 3), k_min=3)
    heard.sum().backward()
    assert heard.item() > 1e-3
    assert student.grad.abs().max() > 1e-3


@pytest.mark.parametrize("loss", [dbild_loss, bild_loss])
def test_masked_entries_leave_both_rows(loss):
    student, teacher = (rows[:6] for rows in CASES["masked"])
    absent = torch.isinf(student) | torch.isinf(teacher)
    value = loss(student, teacher)
    assert value.min() > 0
    # Whatever the other row held at a masked place, even its peak.
    torch.testing.assert_close(loss(student, teacher.masked_fill(absent & teacher.isfinite(), 99.0)), value)
    # And nothing but the row without those places: the knee too.
    for row in range(len(student)):
        kept = ~absent[row]
        torch.testing.assert_close(loss(student[None, row, kept], teacher[None, row, kept]), value[[row]])


@pytest.mark.parametrize("loss", [dbild_loss, bild_loss])
def test_fewer_than_two_candidates_give_zero_and_no_gradient(loss):
    nothing, one = torch.full((9,), -math.inf), torch.full((9,), -math.inf)
    one[4] = 2.0
    student = torch.stack([nothing, one, torch.arange(9.0), torch.arange(9.0)]).requires_grad_()
    teacher = torch.stack([torch.arange(9.0), torch.arange(9.0), one, nothing])
    value = loss(student, teacher)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4))
    assert torch.equal(student.grad, torch.zeros(4, 9))
    for few in (student.detach()[:1], torch.ones(3, 1)):  # a batch without a single pair
        few.requires_grad_()
        value = loss(few, torch.ones_like(few))
        value.sum().backward()
        assert torch.equal(value, torch.zeros(len(few)))
        assert torch.equal(few.grad, torch.zeros_like(few))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_rows_stay_finite_and_close_in_every_dtype(dtype):
    student = logits(16, 200, 11, 1e3).clamp(-1e4, 1e4).to(dtype).requires_grad_()
    teacher = logits(16, 200, 12, 1e3).clamp(-1e4, 1e4).to(dtype)
    for direction in ("reverse", "forward"):
        loss = dbild_loss(student, teacher, direction=direction)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert loss.min() >= 0


def test_no_rows_is_no_error():
    student = torch.zeros(0, 30, requires_grad=True)
    loss = dbild_loss(student, torch.zeros(0, 30))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad.shape == (0, 30)


def test_no_gradient_through_the_choice_of_candidates_but_through_the_teacher_if_it_has_one():
    student, teacher = (rows.clone().requires_grad_() for rows in CASES["random"])
    pair = torch.autograd.grad(pair_form(student, teacher).sum(), (student, teacher))
    linear = torch.autograd.grad(dbild_loss(student, teacher).sum(), (student, teacher))
    torch.testing.assert_close(linear, pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("curve", "k"),
    [
        ([10, 1, 0.5, 0.2, 0], 2),
        ([10, 9, 1, 0.5, 0], 3),
        ([10, 9, 8, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0], 4),
        ([8, 4, 2, 1, 0.5, 0.25, 0], 3),
        ([5, 5, 5, 5], 1),
        ([10, 9.9, 9.5, 8, 0], 1),
        ([3], 1),
        ([10, 9, 1, 0.5, 0, -math.inf, -math.inf], 3),
        ([-math.inf, -math.inf], 1),
    ],
)
def test_knee_of_hand_made_curves(curve, k):
    assert knee(torch.tensor(curve)).item() == k


def test_knee_comes_earlier_on_steeper_curves_and_keeps_leading_shape():
    x = torch.linspace(0, 1, 64)
    steepness = torch.tensor([2.0, 5.0, 10.0, 30.0, 100.0])
    k = knee(torch.exp(-steepness[:, None] * x).view(5, 1, 64))
    assert k.shape == (5, 1)
    assert k.dtype == torch.int64
    assert (k.flatten().diff() < 0).all()


def test_knee_is_unmoved_by_positive_affine_maps():
    curves = logits(50, 64, 13).sort(-1, descending=True).values
    for scale, shift in ((1 / 3, 0.0), (1e3, -5.0), (0.1, 100.0)):
        assert torch.equal(knee(curves.double() * scale + shift), knee(curves))
    assert knee(curves).unique().numel() > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; .* must be positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"k_min": 1}, "k_min is 1 and candidates 64: k_min must be 2 or more"),
        ({"k_min": 9, "candidates": 8}, "k_min is 9 and candidates 8: .* at most candidates"),
        ({"k_max": 2}, "k_max is 2 and k_min 3: k_max must be k_min or more"),
        ({"direction": "rkl"}, "direction is 'rkl'; it is 'reverse'"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        dbild_loss(*CASES["random"], **options)


def test_bad_input_to_bild_and_shapes():
    with pytest.raises(ValueError, match="k is 1: a logits difference needs at least 2"):
        bild_loss(*CASES["random"], k=1)
    for loss in (dbild_loss, bild_loss):
        with pytest.raises(ValueError, match=r"student_logits are \(2, 7\) and teacher_logits \(2, 8\)"):
            loss(torch.zeros(2, 7), torch.zeros(2, 8))
        with pytest.raises(ValueError, match=r"both must be \[N, V\] of one shape; select the answer positions"):
            loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, 7))
