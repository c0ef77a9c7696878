"""What a method's forward returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

# Logits that a language-model head makes at once: half a gigabyte in float32, 883 rows of Qwen2.5's vocabulary.
CHUNK_LOGITS = 1 << 27


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


def chunking(targets: Tensor, *heads: nn.Linear) -> dict[str, int]:
    """`chunk` and `min_chunks` of `answer_terms` for N answer rows and the heads that read them.

    Where ZeRO-3 or FSDP shard a head each of its calls is a collective: then every rank runs as many chunks as the
    rank with most answer tokens.
    """
    chunk = max(1, CHUNK_LOGITS // max(head.out_features for head in heads))
    chunks = -(-targets.numel() // chunk)
    if any(
        hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for h in heads for parameter in h.parameters()
    ):
        most = torch.tensor(chunks, device=targets.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        chunks = int(most)
    return {"chunk": chunk, "min_chunks": max(chunks, 1)}
