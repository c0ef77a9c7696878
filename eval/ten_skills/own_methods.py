"""Methods that the bench tries beside `SwitchKD`: weights over training, positions that count, LLaVA-KD's terms."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.losses import answer_rows, forward_kl
from switchkd.losses.named import divergence
from switchkd.methods import SwitchKD, Terms
from switchkd.methods.switch_kd import Divergence
from switchkd.models.pathway import pathway_of


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

    def __init__(
        self, student, teacher, *, align: str | Divergence, switch: str | Divergence, nats: float = 0.1, **options
    ):
        found = [divergence(each) if isinstance(each, str) else each for each in (align, switch)]
        align, switch = (functools.partial(self._kept, each) for each in found)
        super().__init__(student, teacher, align=align, switch=switch, **options)
        self.nats = nats
        self._weights: Tensor | None = None

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None, num_items_in_batch=None) -> Terms:
        with torch.no_grad():
            seen, blind = (
                pathway_of(self.teacher).head(self._rows(input_ids, attention_mask, pixels, labels))
                for pixels in (pixel_values, torch.zeros_like(pixel_values))
            )
            changes = (forward_kl(blind, seen) > self.nats).float()
            self._weights = changes * (len(changes) / changes.sum().clamp(min=1))
        return super().forward(input_ids, attention_mask, pixel_values, labels, num_items_in_batch)

    def _rows(self, input_ids, attention_mask, pixel_values, labels) -> Tensor:
        teacher = pathway_of(self.teacher)
        visual_tokens = teacher.project(teacher.encode(pixel_values))
        return answer_rows(teacher.decode(input_ids, attention_mask, visual_tokens), labels)[0]

    def _kept(self, divergence, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return divergence(logits, teacher_logits) * self._weights


class LlavaKD(SwitchKD):
    """LLaVA-KD's terms (arXiv 2410.16236, after secondary descriptions): what a language model says at the image tokens
    themselves, in student and teacher.

        visual    KL(teacher, student) of the next-token distributions at each image token
        relation  1 - cosine of two matrices: which image tokens' logits are alike, in student and teacher

    Both are means over images, so that they weigh what the answer positions' terms weigh. Reported weights: 1.0 beside
    1.0 for the answers, and 0.5. Each costs one more student and one more teacher pass here, over the image tokens
    alone: they stand first in a sequence, so nothing after them is seen from them.
    """

    def __init__(self, student, teacher, *, visual_weight: float = 0.0, relation_weight: float = 0.0, **options):
        super().__init__(student, teacher, **options)
        self.visual_weights = {"visual": visual_weight, "relation": relation_weight}

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None, num_items_in_batch=None) -> Terms:
        terms = super().forward(input_ids, attention_mask, pixel_values, labels, num_items_in_batch)
        tokens = input_ids[:, : pathway_of(self.student).visual_token_count]
        logits = _logits(self.student, tokens, pixel_values)
        with torch.no_grad():
            teacher_logits = _logits(self.teacher, tokens, pixel_values)
        added = {
            "visual": forward_kl(logits.flatten(0, 1), teacher_logits.flatten(0, 1)).mean(),
            "relation": (1 - F.cosine_similarity(_alike(logits), _alike(teacher_logits), dim=-1)).mean(),
        }
        added = {name: term for name, term in added.items() if self.visual_weights[name]}
        added = Terms.of(added, self.visual_weights)
        return Terms(
            loss=terms.loss + added.loss,
            named=terms.named | added.named,
            weighted=terms.weighted | added.weighted,
        )


def _logits(model: LlavaForConditionalGeneration, tokens: Tensor, pixel_values: Tensor) -> Tensor:
    path = pathway_of(model)
    return path.head(path.decode(tokens, None, path.project(path.encode(pixel_values)))).float()


def _alike(logits: Tensor) -> Tensor:
    """[images, tokens, vocabulary] -> the cosines between an image's tokens, [images, tokens * tokens]."""
    with torch.autocast(logits.device.type, enabled=False):
        directions = F.normalize(logits, dim=-1)
        return (directions @ directions.mT).flatten(1)
