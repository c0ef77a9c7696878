"""What a method's forward returns."""

from __future__ import annotations

from collections.abc import Mapping
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
    """The terms of a loss by name, each 0-d; `Terms.of` makes them.

    loss: the sum of `weighted`, with its graph. named: the terms before their weights, detached. weighted: the same
    terms after their weights, with their graph.
    """

    loss: Tensor | None = None
    named: dict[str, Tensor] | None = None
    weighted: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Terms:
        """The sum of `terms`, each times its weight; without `weights` each counts once."""
        weighted = {name: term if weights is None else weights[name] * term for name, term in terms.items()}
        return cls(
            loss=sum(weighted.values()),
            named={name: term.detach() for name, term in terms.items()},
            weighted=weighted,
        )


def answer_tokens(labels: Tensor) -> Tensor:
    """Answer tokens of `labels` [batch, time], 0-d: those that a shift by one leaves, labels != -100."""
    return (labels[:, 1:] != -100).sum()


def over_answer_tokens(
    sums: dict[str, Tensor],
    weights: Mapping[str, float],
    targets: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Terms:
    """Summed terms -> Terms: each divided by the answer tokens of the optimizer step, then weighted and added.

    sums: each term summed over this batch's answer positions. targets: [N], this batch's answer tokens, whose number
    is the divisor where `num_items_in_batch` is None (at least 1, so that a batch without answers gives 0).
    """
    count = max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    return Terms.of({name: total / count for name, total in sums.items()}, weights)


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
