"""BiLD and DBiLD: the divergence of the pairwise differences among the top logits of a row.

Of k logits in their leader's descending order, the k (k - 1) / 2 differences z_i - z_j, i < j, go through one
softmax (the flattened upper triangle, Eqs. 10-12 of Switch-KD). Two sides are added: the teacher's top k and
the student's (Eq. 7). BiLD fixes k = 8 and takes the forward KL; DBiLD finds each side's k at the knee of its
curve (Eqs. 8-9) and takes the reverse KL (Eqs. 13-15).

The pairs are never formed. For one side with log-weights p_i - p_j, the softmax over pairs has
    log Z = log sum_j e^(-p_j) sum_(i<j) e^(p_i),
and KL(P || Q) = E_P[(d_i - d_j)] - log Z_P + log Z_Q with d = p - q needs of P only how likely an index is to
be the first and the second of a pair. Both come from cumulative log-sum-exps: cost and memory linear in k
(this form is ours).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from switchkd.losses.divergences import absent_entries, check_rows


def knee(sorted_logits: Tensor) -> Tensor:
    """Where a descending curve bends: [..., C] -> LongTensor [...], how many leading entries to keep, 1 to C.

    Kneedle on the min-max normalised curve: k = argmax_i[(1 - x_i) - y_i] + 1 (Eqs. 8-9), the point furthest
    below the chord. A positive affine map of the row (a temperature, a shift) does not move it. Entries of
    -inf at the end are no part of the curve; a flat curve, or one above its chord, has no knee and gives 1.
    """
    curve = _wide(sorted_logits)
    on_curve = ~torch.isneginf(curve)
    last = on_curve.sum(-1, keepdim=True).sub(1).clamp(min=0)
    bottom = curve.gather(-1, last)
    height = curve[..., :1] - bottom
    y = torch.where(height > 0, (curve - bottom) / height, 0.0)
    x = torch.arange(curve.shape[-1], device=curve.device, dtype=curve.dtype) / last.clamp(min=1)
    return ((1.0 - x) - y).masked_fill(~on_curve, -torch.inf).argmax(-1) + 1


def dbild_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 3.0,
    candidates: int = 64,
    k_min: int = 3,
    k_max: int | None = None,
    direction: str = "reverse",
    temperature_squared: bool = False,
) -> Tensor:
    """Dynamic bi-directional logits difference (Switch-KD, Eqs. 7-15): [N, V], [N, V] -> [N] in nats.

    student_logits: z_S, or the switch logits. teacher_logits: z_T. Any float type.
    candidates: how many top logits the knee is sought among, cut to V. Ours: over a whole vocabulary the knee
        lies in the thousands.
    k_min, k_max: bounds of each row's k. One pair (k = 2) is a softmax over one value: loss 0, no gradient;
        that is where a row with one dominant logit lands, hence 3 by default.
    direction: "reverse" is KL(student || teacher) as in the paper, "forward" KL(teacher || student).
    temperature_squared: multiply by temperature ** 2; neither paper does.

    An entry that is -inf in either row leaves both sides' candidates. Which indices lead carries no gradient,
    the logits at them do. Among equal logits the order is torch.topk's. ValueError on settings out of range.
    """
    if not 2 <= k_min <= candidates:
        raise ValueError(
            f"k_min is {k_min} and candidates {candidates}: k_min must be 2 or more, and at most candidates"
        )
    if k_max is not None and k_max < k_min:
        raise ValueError(f"k_max is {k_max} and k_min {k_min}: k_max must be k_min or more, or None")
    loss = _both_sides(
        student_logits,
        teacher_logits,
        candidates,
        lambda leading: knee(leading).clamp(k_min, k_max),
        temperature,
        direction,
    )
    return loss * temperature**2 if temperature_squared else loss


def bild_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 3.0,
    k: int = 8,
    direction: str = "forward",
    temperature_squared: bool = False,
) -> Tensor:
    """Bi-directional logits difference, BiLD: `dbild_loss` with one fixed k (cut to V) and the forward KL."""
    if k < 2:
        raise ValueError(f"k is {k}: a logits difference needs at least 2 logits, a loss above zero 3")
    loss = _both_sides(
        student_logits,
        teacher_logits,
        k,
        lambda leading: torch.full(leading.shape[:-1], k, device=leading.device),
        temperature,
        direction,
    )
    return loss * temperature**2 if temperature_squared else loss


def _both_sides(
    student_logits: Tensor,
    teacher_logits: Tensor,
    candidates: int,
    choose_k: Callable[[Tensor], Tensor],
    temperature: float,
    direction: str,
) -> Tensor:
    """The teacher-led term plus the student-led term, each over its leader's own top k (Eq. 7): [N]."""
    check_rows(student_logits, teacher_logits, temperature)
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction is {direction!r}; it is 'reverse', KL(student || teacher), or 'forward'")
    candidates = min(candidates, student_logits.shape[-1])
    absent = absent_entries(student_logits, teacher_logits)
    leading, indices = [], []
    for leader in (teacher_logits.detach(), student_logits.detach()):
        if absent is not None:
            leader = leader.masked_fill(absent, -torch.inf)
        top = leader.topk(candidates, dim=-1)
        leading.append(top.values)
        indices.append(top.indices)
    # The two sides are one batch [2 N, C] from here on, C cut to the longest k.
    leading = torch.cat(leading)
    present = torch.isneginf(leading).logical_not().sum(-1)
    k = torch.minimum(choose_k(leading), present)
    longest = max(int(k.max()), 1) if len(k) else 1  # one wait for the device; most rows' knee comes early
    indices = torch.cat([side[:, :longest] for side in indices], dim=-1)
    # One gather a model, since its backward fills a whole [N, V].
    student, teacher = (
        torch.cat(_wide(logits.gather(-1, indices)).split(longest, dim=-1)) / temperature
        for logits in (student_logits, teacher_logits)
    )
    loss = _pair_kl(student, teacher, k) if direction == "reverse" else _pair_kl(teacher, student, k)
    teacher_led, student_led = loss.to(torch.promote_types(student_logits.dtype, torch.float32)).chunk(2)
    return teacher_led + student_led


def _pair_kl(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """KL(P || Q) of the softmaxes over all differences i < j < k: [M, C], [M, C], [M] -> [M]."""
    live = torch.arange(p.shape[-1], device=p.device) < k[:, None]
    p, q = torch.where(live, p, 0.0), torch.where(live, q, 0.0)
    log_z_p, log_second = _pair_log_weights(p, live)
    log_z_q, _ = _pair_log_weights(q, live)
    later = torch.logcumsumexp(_negative(p, live).flip(-1), dim=-1).flip(-1)
    is_first = (p[:, :-1] + later[:, 1:] - log_z_p[:, None]).exp()
    is_second = (log_second - log_z_p[:, None]).exp()
    difference = p - q
    expected = (is_first * difference[:, :-1]).sum(-1) - (is_second * difference[:, 1:]).sum(-1)
    # One pair is certain under both, no pair says nothing: exactly 0, whatever the rounding above.
    return torch.where(k > 2, expected - log_z_p + log_z_q, 0.0)


def _pair_log_weights(v: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """log sum of e^(v_i - v_j), i < j: over all pairs [M]; over i alone, for each j >= 1 [M, C - 1]."""
    by_second = torch.logcumsumexp(v, dim=-1)[:, :-1] + _negative(v, live)[:, 1:]
    return by_second.logsumexp(-1), by_second


def _negative(v: Tensor, live: Tensor) -> Tensor:
    """-v where live; elsewhere so low that its weight is 0, yet finite: -inf would turn to NaN going back."""
    return torch.where(live, -v, torch.finfo(v.dtype).min / 8)


def _wide(logits: Tensor) -> Tensor:
    """float64, so that rows of +-1e4 keep their last digits through the cancelling sums; a few columns only.

    Apple's GPU has no float64 and keeps float32.
    """
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
