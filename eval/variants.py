"""The variants: what each adds to the student's cross entropy, and why it should help."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from switchkd.losses import answer_rows, forward_kl
from switchkd.methods import SupervisedMethod, SwitchKD, Terms
from switchkd.methods.switch_kd import DIVERGENCES
from switchkd.models import pathway
from switchkd.models.adapter import fit_switch_adapter


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the tables.

    options: of `SwitchKD`; None is cross entropy alone. lr: times the size's rate. freeze: parts of the student.
    blank: trained and judged with blank pictures. equal_flops: as many steps as the paper's variant has arithmetic.
    narrow: the student's tower is narrower than the teacher's and enters the switch through a fitted adapter.
    schedule: "early" or "late", where the teacher's terms fade out or in over the run. seen: the teacher's terms count
    only where it changes when the picture is taken away.
    """

    name: str
    why: str
    options: Mapping[str, Any] | None = None
    lr: float = 1.0
    freeze: tuple[str, ...] = ()
    blank: bool = False
    equal_flops: bool = False
    narrow: bool = False
    schedule: str | None = None
    seen: bool = False
    starts: tuple[str, ...] = ("apart", "teacher")

    def settings(self) -> dict:
        """What decides a run's result."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "why", "starts")}

    def method(
        self, student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, pixels: Tensor
    ) -> nn.Module:
        """pixels [images, 3, S, S]: a few hundred pictures that an adapter is fitted on."""
        if self.options is None:
            return SupervisedMethod(student)
        options = dict(self.options)
        if self.narrow:
            options["switch_adapter"] = fit_switch_adapter(student, teacher, [pixels])
        if self.seen:
            return SeenOnly(student, teacher, **options)
        if self.schedule:
            return Scheduled(student, teacher, late=self.schedule == "late", **options)
        return SwitchKD(student, teacher, **options)


class Scheduled(SwitchKD):
    """The teacher's terms weighted along a half cosine over the run, 2 times their weight at one end and 0 at the
    other, so that the mean weight stays. Early: the teacher leads while the student knows little, and at the end the
    student's own errors count alone. Late: a teacher is read best by a student that knows the words."""

    def __init__(self, student, teacher, *, late: bool, **options):
        super().__init__(student, teacher, **options)
        self.late = late
        self._full = dict(self.weights)

    def progress(self, fraction: float) -> None:
        factor = 1 + math.cos(math.pi * (1 - fraction if self.late else fraction))
        self.weights = {name: weight * (1 if name == "ce" else factor) for name, weight in self._full.items()}


class SeenOnly(SwitchKD):
    """The teacher's terms at the positions alone where the teacher, its picture taken away, says something else.

    Elsewhere (the end of an answer, a word that grammar forces) teacher and student agree without looking, and what is
    left of a difference is noise in the visual terms. A position counts where KL(teacher, teacher without picture) is
    over `nats`; those that count are weighted up so that a term's mean weight stays. Costs one more teacher pass.
    """

    def __init__(self, student, teacher, *, align: str, switch: str, nats: float = 0.1, **options):
        align, switch = (functools.partial(self._kept, DIVERGENCES[name]) for name in (align, switch))
        super().__init__(student, teacher, align=align, switch=switch, **options)
        self.nats = nats
        self._weights: Tensor | None = None

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None, num_items_in_batch=None) -> Terms:
        with torch.no_grad():
            seen, blind = (
                pathway.head(self.teacher, self._rows(input_ids, attention_mask, pixels, labels))
                for pixels in (pixel_values, torch.zeros_like(pixel_values))
            )
            changes = (forward_kl(blind, seen) > self.nats).float()
            self._weights = changes * (len(changes) / changes.sum().clamp(min=1))
        return super().forward(input_ids, attention_mask, pixel_values, labels, num_items_in_batch)

    def _rows(self, input_ids, attention_mask, pixel_values, labels) -> Tensor:
        visual_tokens = pathway.project(self.teacher, pathway.encode(self.teacher, pixel_values))
        return answer_rows(pathway.decode(self.teacher, input_ids, attention_mask, visual_tokens), labels)[0]

    def _kept(self, divergence, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return divergence(logits, teacher_logits) * self._weights


def _pair(align: str | None, switch: str | None, **options) -> dict:
    return {"align": align, "switch": switch, **options}


_KL = _pair("forward_kl", "forward_kl")
_PAPER = _pair("dbild", "dbild")
_APART = ("apart",)


def _both(base: dict, **options) -> dict:
    """The same options for the align and the switch term."""
    return {**base, "align_options": options, "switch_options": options}


PIECES: dict[str, tuple[Variant, ...]] = {
    "core": (
        Variant("sft", "what the answers alone teach"),
        Variant("sft_low_lr", "SFT may want another rate", lr=0.5),
        Variant("sft_high_lr", "SFT may want another rate", lr=2.0),
        Variant("sft_equal_flops", "a teacher costs arithmetic; more steps cost it too", equal_flops=True),
        Variant(
            "blind", "what the questions give away: pictures blanked in training and judging", blank=True, starts=_APART
        ),
        Variant(
            "kl_align",
            "the teacher's whole next-word distribution: what is wrong by how much",
            _pair("forward_kl", None),
        ),
        Variant("dbild_align", "the order of the teacher's leading words", _pair("dbild", None)),
        Variant(
            "feature_cosine",
            "the cheap rival of the switch: the tower follows the teacher's features themselves",
            _pair(None, None, feature="cosine"),
        ),
        Variant("switch_kd", "the paper: the tower learns what the teacher's language model can read", _PAPER),
        Variant(
            "kl_switch", "forward KL covers all that the teacher finds likely, at every word of the vocabulary", _KL
        ),
    ),
    "divergence": (
        Variant(
            "jsd", "bounded, so that rows where the student is far off do not lead", _pair("jsd", "jsd"), starts=_APART
        ),
        Variant("bild", "the parent of DBiLD: 8 leading words, forward KL", _pair("bild", "bild"), starts=_APART),
        Variant(
            "reverse_kl",
            "the student keeps to where the teacher is likely",
            _pair("reverse_kl", "reverse_kl"),
            starts=_APART,
        ),
        Variant(
            "dbild_kl",
            "order for the student's answers, the whole distribution for the tower",
            _pair("dbild", "forward_kl"),
            starts=_APART,
        ),
        Variant("kl_dbild", "the other way round", _pair("forward_kl", "dbild"), starts=_APART),
        Variant(
            "kl_switch_only", "what the switch does without an align term", _pair(None, "forward_kl"), starts=_APART
        ),
    ),
    "knee": (
        Variant(
            "bild_reverse",
            "the paper's direction with a fixed k of 8: what the knee adds",
            _both(_pair("bild", "bild"), direction="reverse"),
            starts=_APART,
        ),
        Variant(
            "dbild_forward", "the knee with the forward direction", _both(_PAPER, direction="forward"), starts=_APART
        ),
        Variant(
            "candidates_16",
            "a knee among few words keeps to the answers of the skill",
            _both(_PAPER, candidates=16),
            starts=_APART,
        ),
        Variant("candidates_32", "between the two", _both(_PAPER, candidates=32), starts=_APART),
    ),
    "temperature": (
        Variant(
            "dbild_t1",
            "differences of a small vocabulary are large enough without softening",
            _both(_PAPER, temperature=1.0),
            starts=_APART,
        ),
        Variant(
            "dbild_t3_squared",
            "the gradient's scale that the temperature takes away",
            _both(_PAPER, temperature_squared=True),
            starts=_APART,
        ),
        Variant(
            "kl_t2_squared",
            "a softer teacher says more of the unlikely words",
            _both(_KL, temperature=2.0, temperature_squared=True),
            starts=_APART,
        ),
    ),
    "weights": (
        Variant(
            "paper_x3",
            "the paper's terms may be too quiet here",
            {**_PAPER, "align_weight": 3.0, "switch_weight": 3.0},
            starts=_APART,
        ),
        Variant("kl_x3", "as above, for the KL", {**_KL, "align_weight": 3.0, "switch_weight": 3.0}, starts=_APART),
        Variant(
            "kl_switch_x3", "the tower is what the student lacks most", {**_KL, "switch_weight": 3.0}, starts=_APART
        ),
    ),
    "encoder": (
        Variant(
            "frozen_encoder",
            "how much of the gain a tower that cannot move would keep",
            _pair("forward_kl", None),
            freeze=("vision_tower",),
            starts=_APART,
        ),
        Variant(
            "relation",
            "which patches are alike, without asking for the same features",
            _pair(None, None, feature="relation"),
            starts=_APART,
        ),
        Variant(
            "kl_relation",
            "LLaVA-KD's mixture at the encoder",
            _pair("forward_kl", None, feature="relation"),
            starts=_APART,
        ),
        Variant(
            "kl_cosine",
            "the cheap rival of the switch beside the align term",
            _pair("forward_kl", None, feature="cosine"),
            starts=_APART,
        ),
        Variant(
            "kl_switch_cosine",
            "features say where, the switch says what matters of them",
            {**_KL, "feature": "cosine"},
            starts=_APART,
        ),
        Variant("narrow_sft", "a tower narrower than the teacher's, without a teacher", narrow=True, starts=_APART),
        Variant("narrow_switch", "the same tower through a fitted switch adapter", _KL, narrow=True, starts=_APART),
    ),
    "schedule": (
        Variant("kl_early", "the teacher leads first", _KL, schedule="early", starts=_APART),
        Variant("kl_late", "the teacher leads last", _KL, schedule="late", starts=_APART),
    ),
    "seen": (
        Variant("kl_seen", "only positions where the picture matters to the teacher", _KL, seen=True, starts=_APART),
        Variant("paper_seen", "as above, for the paper's terms", _PAPER, seen=True, starts=_APART),
    ),
}
VARIANTS: dict[str, Variant] = {variant.name: variant for piece in PIECES.values() for variant in piece}
# One of each kind, for a size that has no time for all.
PIECES["few"] = tuple(VARIANTS[name] for name in ("jsd", "dbild_kl", "narrow_sft", "narrow_switch", "kl_seen"))

SFT = ("sft", "sft_low_lr", "sft_high_lr")  # the table shows the best of the three
