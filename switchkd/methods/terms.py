"""What a method's forward returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from transformers.utils import ModelOutput

CHUNK = 1024  # answer rows that a language-model head reads at once: bounds the memory of logits


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


def chunks_of_all_ranks(targets: Tensor) -> int:
    """ceil(N / CHUNK) of the rank with most answer tokens.

    Where ZeRO-3 or FSDP shard the heads each head call is a collective, so all ranks must run equally many chunks.
    """
    chunks = -(-targets.numel() // CHUNK)
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return chunks
    most = torch.tensor(chunks, device=targets.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
