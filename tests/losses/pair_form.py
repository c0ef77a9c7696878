"""BiLD and DBiLD with stored pairs, a row at a time in float64: slow, plain, nothing shared with the package.

Only the order among equal logits is torch.topk's here too, for no definition names another.
"""

from __future__ import annotations

import torch
from torch import Tensor


def knee_of(curve: list[float]) -> int:
    """The number of leading entries up to the point furthest below the chord, by the definition."""
    if len(curve) < 2 or curve[0] == curve[-1]:
        return 1
    height = curve[0] - curve[-1]
    gaps = [(1 - i / (len(curve) - 1)) - (v - curve[-1]) / height for i, v in enumerate(curve)]
    return gaps.index(max(gaps)) + 1


def pair_form(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 3.0,
    candidates: int = 64,
    k_min: int = 3,
    k_max: int | None = None,
    fixed_k: int | None = None,
    direction: str = "reverse",
) -> Tensor:
    rows = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        kept = torch.isfinite(s) & torch.isfinite(t)
        s, t = s[kept], t[kept]
        total = s.sum() * 0
        for leader in (t.detach(), s.detach()):
            order = leader.topk(min(candidates, len(leader))).indices
            k = fixed_k or min(max(knee_of(leader[order].tolist()), k_min), k_max or candidates)
            order = order[:k]
            if len(order) < 2:
                continue
            log_p = {}
            for name, values in (("student", s[order] / temperature), ("teacher", t[order] / temperature)):
                differences = [values[i] - values[j] for i in range(len(order)) for j in range(i + 1, len(order))]
                log_p[name] = torch.stack(differences).log_softmax(0)
            a, b = ("student", "teacher") if direction == "reverse" else ("teacher", "student")
            total = total + (log_p[a].exp() * (log_p[a] - log_p[b])).sum()
        rows.append(total)
    return torch.stack(rows)
