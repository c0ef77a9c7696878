"""Cross entropy alone: the teacher and the undistilled student come from the same trainer as the distilled one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.losses.answers import answer_rows, answer_terms
from switchkd.methods.batch_checks import check_batch
from switchkd.methods.terms import Terms, answer_tokens, chunking, over_answer_tokens
from switchkd.models.pathway import pathway_of


class SupervisedMethod(nn.Module):
    """Next-token cross entropy on answer positions.

    student: the model to train; freeze its parts with `switchkd.models.freeze`. The loss is a sum over the batch's
    answer tokens, divided by `num_items_in_batch` (the answer tokens of the whole optimizer step) or, without it,
    by the batch's own.
    """

    frozen = ()

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        self.student = student

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Terms:
        """input_ids, attention_mask, labels [batch, time]; pixel_values [images, 3, height, width] or None.

        Raises ValueError for a batch of other shapes, and for image tokens that are not those of the pictures.
        """
        check_batch(self.student, input_ids, attention_mask, pixel_values, labels)
        student, blank = pathway_of(self.student), pixel_values is None
        if blank:
            pixel_values = student.blank_pixels(like=input_ids)
        visual_tokens = student.project(student.encode(pixel_values))
        hidden = student.decode(input_ids, attention_mask, visual_tokens, blank=blank)
        rows, targets = answer_rows(hidden, labels)
        sums = answer_terms(rows, student.head, targets, **chunking(targets, student.head))
        return over_answer_tokens(sums, {"ce": 1.0}, targets, num_items_in_batch)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The answer tokens of a batch, which its loss is a mean over."""
        return answer_tokens(batch["labels"])

    def progress(self, fraction: float) -> None:
        """Called by the trainer before each step with the run's fraction done, 0 to 1. Nothing here depends on it."""
