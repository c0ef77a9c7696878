from __future__ import annotations

import math

import pytest
import torch

from switchkd.losses import forward_kl, jsd, reverse_kl

LOSSES = [forward_kl, reverse_kl, jsd]


def pair(seed: int = 0, rows: int = 6, width: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 4 * torch.randn(2, rows, width, generator=generator)
    return student.requires_grad_(), teacher


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


def by_definition(name: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: float):
    s, t = ((rows.double() / temperature).softmax(-1) for rows in (student, teacher))
    mixture = beta * t + (1 - beta) * s
    return {
        "forward_kl": kl(t, s),
        "reverse_kl": kl(s, t),
        "jsd": beta * kl(t, mixture) + (1 - beta) * kl(s, mixture),
    }[name]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_equal_to_the_definition_in_float64(loss, temperature):
    student, teacher = pair()
    options = {"beta": 0.3} if loss is jsd else {}
    value = loss(student, teacher, temperature=temperature, **options)
    expected = by_definition(loss.__name__, student, teacher, temperature, 0.3)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    squared = loss(student, teacher, temperature=temperature, temperature_squared=True, **options)
    torch.testing.assert_close(squared, value * temperature**2)


def test_direction_by_hand():
    # Teacher 1/2, 1/4, 1/4; student 1/3, 1/3, 1/3.
    teacher, student = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.zeros(1, 3)
    assert forward_kl(student, teacher).item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-5)
    assert reverse_kl(student, teacher).item() == pytest.approx(math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3, rel=1e-5)


def test_jsd_is_symmetric_bounded_and_tends_to_the_two_kls():
    student, teacher = pair()
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student))
    assert jsd(100 * student, 100 * teacher).max() <= math.log(2) + 1e-6
    small = 1e-6
    close = {"rtol": 1e-3, "atol": 1e-4}
    s, t = student.double() / 4, teacher.double() / 4
    torch.testing.assert_close(jsd(s, t, beta=small) / small, forward_kl(s, t), **close)
    torch.testing.assert_close(jsd(s, t, beta=1 - small) / small, reverse_kl(s, t), **close)


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_for_equal_rows(loss):
    student, _ = pair()
    value = loss(student, student.detach())
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(6), atol=1e-6, rtol=0)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_finite_for_extreme_rows_and_ties(loss, dtype):
    rows = torch.tensor([[1e4, -1e4, 0.0, 0.0], [-1e4, 1e4, 1e4, 1e4], [7.0, 7.0, 7.0, 7.0]], dtype=dtype)
    for teacher in (rows, rows.flip(0), rows.flip(1)):
        student = rows.clone().requires_grad_()
        value = loss(student, teacher)
        value.sum().backward()
        assert value.isfinite().all()
        assert value.min() > -1e-6
        assert student.grad.isfinite().all()
    assert loss(rows, rows.flip(1)).max() > 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_entries_leave_both_rows(loss):
    student, teacher = pair(1)
    absent = torch.rand(student.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    in_student = absent & (torch.arange(40) % 2 == 0)
    masked_student = student.detach().masked_fill(in_student, -math.inf).requires_grad_()
    value = loss(masked_student, teacher.masked_fill(absent & ~in_student, -math.inf))
    (gradient,) = torch.autograd.grad(value.sum(), masked_student)
    for row in range(len(value)):
        kept = ~absent[row]
        short = student.detach()[None, row, kept].requires_grad_()
        expected = loss(short, teacher[None, row, kept])
        (expected_gradient,) = torch.autograd.grad(expected.sum(), short)
        torch.testing.assert_close(value[[row]], expected)
        torch.testing.assert_close(gradient[None, row, kept], expected_gradient)
        assert torch.equal(gradient[row, ~kept], torch.zeros(int(absent[row].sum())))


@pytest.mark.parametrize("loss", LOSSES)
def test_fewer_than_two_candidates_give_zero_and_no_gradient(loss):
    nothing, one = torch.full((5,), -math.inf), torch.full((5,), -math.inf)
    one[2] = 3.0
    student = torch.stack([nothing, one, torch.arange(5.0), torch.arange(5.0)]).requires_grad_()
    teacher = torch.stack([torch.arange(5.0), torch.arange(5.0), one, nothing])
    value = loss(student, teacher)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4))
    assert torch.equal(student.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_input(loss):
    with pytest.raises(ValueError, match=r"student_logits are \(2, 7\) and teacher_logits \(2, 8\)"):
        loss(torch.zeros(2, 7), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"both must be \[N, V\]"):
        loss(torch.zeros(7), torch.zeros(7))
    for temperature in (0, -2.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}; .* must be positive"):
            loss(*pair(), temperature=temperature)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_jsd_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}; it must lie between 0 and 1"):
        jsd(*pair(), beta=beta)
