"""What a method's forward returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class Terms(ModelOutput):
    """`loss`: 0-d, the weighted sum with its graph. `named`: each term by name, 0-d, detached, before its weight."""

    loss: Tensor | None = None
    named: dict[str, Tensor] | None = None


def over_answer_tokens(
    sums: dict[str, Tensor],
    weights: dict[str, float],
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Terms:
    """Summed terms -> Terms: each divided by the answer tokens of the optimizer step, then weighted and added.

    sums: each term summed over this batch's answer positions. targets: [N], this batch's answer tokens, whose number
    is the divisor where `num_items_in_batch` is None (at least 1, so that a batch without answers gives 0).
    """
    count = max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    means = {name: total / count for name, total in sums.items()}
    loss = sum(weights[name] * mean for name, mean in means.items())
    return Terms(loss=loss, named={name: mean.detach() for name, mean in means.items()})
