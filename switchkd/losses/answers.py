"""From hidden states at answer positions to the summed loss terms, without logits of a whole batch.

Logits [batch, time, vocabulary] of a student, a teacher and a switch pass would take more memory than the
models. Here only answer positions reach a head, a chunk of rows at a time, and the logits of all chunks but
the last are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Divergence = Callable[[Tensor, Tensor], Tensor]


def answer_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict an answer token, and those tokens: the one place of shift and mask.

    hidden [batch, time, width], labels [batch, time] with -100 off the answer -> rows [N, width], targets
    [N]. Position t is kept where labels[t + 1] is not -100: it is the one that predicts token t + 1. N may
    be 0. ValueError where batch or time differ.
    """
    if hidden.dim() != 3 or hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and labels {tuple(labels.shape)}: they must be "
            "[batch, time, width] and [batch, time] of the same batch and time"
        )
    targets = labels[:, 1:]
    answer_mask = targets != -100
    return hidden[:, :-1][answer_mask], targets[answer_mask]


def answer_terms(
    student_hidden: Tensor,
    student_head: nn.Module,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    switch_hidden: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    align: Divergence | None = None,
    switch: Divergence | None = None,
    shared_vocab: int | None = None,
    chunk: int = 1024,
    min_chunks: int = 1,
) -> dict[str, Tensor]:
    """Sums over N answer positions, 0-d: {"ce": ..., "align": ..., "switch": ...}, the last two where set.

    student_hidden [N, Hs], teacher_hidden and switch_hidden [N, Ht]: the same rows, as `answer_rows` gives
        them.
    labels [N]: the token to predict at each row, already shifted.
    student_head, teacher_head: the language-model heads, called and never read, so that sharding hooks fire;
        a head is called once a chunk for each kind of row it reads. The teacher's rows see no gradient, the
        switch rows do.
    align, switch: student logits or switch logits [n, V], teacher logits [n, V] -> one value a row [n].
    shared_vocab: align and switch see the first `shared_vocab` logits; None: all, which must be equally many.
        Cross entropy always sees the student's whole vocabulary.
    chunk: rows a head reads at once, at most; what bounds the memory.
    min_chunks: run at least this many chunks, empty ones too. Where heads are sharded over ranks each call is
        a collective, so every rank needs the number of the rank with most rows, ceil(N / chunk).

    With N = 0 every sum is 0 and still reaches head and hidden states in the graph. ValueError where the
    inputs do not fit together.
    """
    distils = align is not None or switch is not None
    if distils and (teacher_hidden is None or teacher_head is None):
        raise ValueError("align and switch compare with the teacher's logits: pass teacher_hidden and teacher_head")
    if switch is not None and switch_hidden is None:
        raise ValueError("switch is set but switch_hidden is None: pass the hidden states of the switch pass")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a chunk holds at least 1 row")
    if shared_vocab is not None and shared_vocab < 1:
        raise ValueError(f"shared_vocab is {shared_vocab}; at least 1 token must be shared, or None for all")
    rows = {"student_hidden": student_hidden, "labels": labels}
    if distils:
        rows["teacher_hidden"] = teacher_hidden
    if switch is not None:
        rows["switch_hidden"] = switch_hidden
    for name, tensor in rows.items():
        if len(tensor) != len(student_hidden):
            raise ValueError(
                f"{name} has {len(tensor)} rows and student_hidden {len(student_hidden)}: all must be the "
                "same answer positions"
            )

    def terms(student_hidden, labels, teacher_hidden=None, switch_hidden=None) -> list[Tensor]:
        student_logits = student_head(student_hidden)
        sums = [F.cross_entropy(student_logits.float(), labels, reduction="sum")]
        if distils:
            with torch.no_grad():
                teacher_logits = teacher_head(teacher_hidden)
        if align is not None:
            sums.append(_summed("align", align, student_logits, teacher_logits, shared_vocab))
        if switch is not None:
            switch_logits = teacher_head(switch_hidden)
            sums.append(_summed("switch", switch, switch_logits, teacher_logits, shared_vocab))
        return sums

    chunks = max(math.ceil(len(labels) / chunk), min_chunks, 1)
    sizes = [len(labels) // chunks + (i < len(labels) % chunks) for i in range(chunks)]
    *pieces, last = zip(*(tensor.split(sizes) for tensor in rows.values()), strict=True)
    sums = [checkpoint(terms, *piece, use_reentrant=False) for piece in pieces]
    # Backward begins with the last chunk, whose logits are still there: recomputing them would save no memory.
    sums.append(terms(*last))
    names = ["ce"] + ["align"] * (align is not None) + ["switch"] * (switch is not None)
    return {name: torch.stack(of_chunks).sum() for name, *of_chunks in zip(names, *sums, strict=True)}


def _summed(
    name: str, divergence: Divergence, logits: Tensor, teacher_logits: Tensor, shared_vocab: int | None
) -> Tensor:
    widths = logits.shape[-1], teacher_logits.shape[-1]
    if shared_vocab is None and widths[0] != widths[1]:
        raise ValueError(
            f"{name}: the student's head gives {widths[0]} logits and the teacher's {widths[1]}: pass "
            "shared_vocab, the number of leading rows that mean the same token to both"
        )
    if shared_vocab is not None and shared_vocab > min(widths):
        raise ValueError(
            f"{name}: shared_vocab is {shared_vocab}, but the student's head gives {widths[0]} logits and "
            f"the teacher's {widths[1]}: shared_vocab can be at most the smaller"
        )
    values = divergence(logits[:, :shared_vocab], teacher_logits[:, :shared_vocab])
    if values.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} returned shape {tuple(values.shape)} for {len(logits)} rows: it must give one value a "
            f"row, shape ({len(logits)},), neither summed nor averaged"
        )
    return values.float().sum()
