"""Divergences of two next-token distributions over the whole vocabulary, one value in nats per row.

All take `student_logits` and `teacher_logits` [N, V] of any float type and return [N], computed in log space
in float32 (float64 where the logits are). p_T and p_S are the softmax of logits / temperature. An entry that
is -inf in either row leaves both rows before the softmax; with fewer than two entries left the loss and its
gradient are 0. `temperature_squared` multiplies by temperature ** 2, which keeps the gradient's scale over
temperatures (Hinton et al., 2015). ValueError where the shapes differ or a setting is out of range.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(p_T || p_S): the expectation is under the teacher, so the student covers all it finds likely."""
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(log_teacher, log_student) * _scale(temperature, temperature_squared)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """KL(p_S || p_T): the expectation is under the student, so it keeps to where the teacher is likely."""
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(log_student, log_teacher) * _scale(temperature, temperature_squared)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = False,
) -> Tensor:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S, with 0 < beta < 1.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024); symmetric and at most log 2 at
    beta 0.5. Towards the ends it fades to 0; divided by beta it tends to the forward KL, by 1 - beta to the
    reverse.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1 (use forward_kl or reverse_kl for the ends)")
    log_student, log_teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    log_mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    value = beta * _kl(log_teacher, log_mixture) + (1.0 - beta) * _kl(log_student, log_mixture)
    return value * _scale(temperature, temperature_squared)


def check_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """ValueError unless both are [N, V] of one shape and the temperature is positive."""
    shapes = [tuple(logits.shape) for logits in (student_logits, teacher_logits)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ValueError(
            f"student_logits are {shapes[0]} and teacher_logits {shapes[1]}: both must be [N, V] of one "
            "shape; select the answer positions and cut both to the shared vocabulary first"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it divides the logits and must be positive")


def absent_entries(student_logits: Tensor, teacher_logits: Tensor) -> Tensor | None:
    """Mask [N, V] of the entries that are -inf in either row, or None where no row has one.

    None is the usual case; it costs two reductions and spares every caller its masked copies of the
    vocabulary.
    """
    with torch.no_grad():
        lowest = torch.minimum(student_logits.amin(-1), teacher_logits.amin(-1))
        if not torch.isneginf(lowest).any():
            return None
        return torch.isneginf(student_logits) | torch.isneginf(teacher_logits)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> list[Tensor]:
    check_rows(student_logits, teacher_logits, temperature)
    absent = absent_entries(student_logits, teacher_logits)
    rows = []
    for logits in (student_logits, teacher_logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1.0:
            logits = logits / temperature
        if absent is not None:
            # Lowest finite number, not -inf: probability exactly 0, and no inf - inf on the way back.
            logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        rows.append(F.log_softmax(logits, dim=-1))
    return rows


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _scale(temperature: float, squared: bool) -> float:
    return temperature**2 if squared else 1.0
