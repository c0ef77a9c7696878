"""Switch-KD (arXiv 2604.14629): the teacher reads the student's visual features.

    z_T      = L_T(P_T(V_T(image)), text)      teacher logits, no gradient
    z_S      = L_S(P_S(V_S(image)), text)      student logits
    z_switch = L_T(P_T(V_S(image)), text)      switch logits, gradient on           (Eq. 5)
    loss     = CE(z_S) + align_weight * D(z_T, z_S) + switch_weight * D(z_T, z_switch)   (Eq. 1, 4, 6)

V is the vision tower, P the projector, L the language model; D is DBiLD in the paper. Which parts are frozen, what is
switched and what it is compared with follow the official figure and README; equation numbers, weights and temperature
are as reported by public notes and ports, for the paper's own text was not read. Two things are ours: where the two
towers' features differ in width or number, an adapter A stands on the switch path, z_switch = L_T(P_T(A(V_S(image))),
text); and a term may compare the features themselves, the cheap rival of the switch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from switchkd import losses
from switchkd.losses.answers import answer_rows, answer_terms
from switchkd.losses.named import divergence
from switchkd.methods.batch_checks import check_batch
from switchkd.methods.pair_checks import (
    check_apart,
    check_encoders_move,
    check_features_meet,
    check_features_train,
    shared_rows,
)
from switchkd.methods.terms import Terms, answer_tokens, chunking, over_answer_tokens
from switchkd.models.image_tokens import images_per_sample, with_image_tokens
from switchkd.models.llava import recompute_activations
from switchkd.models.pathway import pathway_of

Divergence = Callable[[Tensor, Tensor], Tensor]

FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": losses.token_cosine,
    "relation": losses.token_relation,
}


class SwitchKD(nn.Module):
    """Trains `student` against a frozen `teacher` over three passes of the same answer positions.

    student, teacher: LLaVA models over one vocabulary; the teacher is frozen here and kept in eval mode. It reads what
        the student's processor encoded, so `<image>` and padding may have other ids in it, or none.
    align, switch: the divergence of z_S and of z_switch from z_T: a name of `switchkd.losses.named.DIVERGENCES`, your
        own function [N, V] (student or switch logits), [N, V] (teacher logits) -> [N], itself or by name as
        "package.module:function", or None to leave the term and its pass out.
    align_weight, switch_weight: lambda 1 and 2 of Eq. 1; 1.0 and 1.0 as reported of the paper.
    align_options, switch_options: keyword arguments of the divergence, such as {"temperature": 3.0}.
    feature: the distance of the student's vision features from the teacher's: a name of `FEATURES`, your own function
        [images, tokens, width] (student), the same (teacher) -> [images], or None. Each image counts as much as its
        sample has answer tokens, over its images, so that the term is a mean over answer tokens as the others are.
    feature_weight: weight of that term.
    shared_vocab: logits are cut to the first `shared_vocab` rows before a divergence sees them; None: all rows, which
        then must be equally many. `switchkd.models.shared_vocab` finds it from the two tokenizers. It ends before
        `<image>` where that has other ids in student and teacher.
    switch_adapter: where the student's features have another width or number of visual tokens than the teacher's, a
        module [images, student's tokens, student's width] -> [images, teacher's tokens, teacher's width]
        (`switchkd.models.adapter.fit_switch_adapter`). Switch and feature term read the student's features through it,
        and it trains along; it is in the method's checkpoint and not in the exported student.
    gradient_checkpointing: recompute the teacher's activations on the switch pass instead of keeping them.

    The gradients of switch and feature term reach the student's vision tower and the adapter alone: projector and
    language model on the switch's path are the teacher's. Where one image is another number of visual tokens to the
    teacher, its passes read the same samples with as many image tokens as it needs. Raises ValueError where the pair
    cannot be switched: towers of other widths or another number of visual tokens without an adapter, an adapter where
    both are equal, a frozen adapter, pictures of two sizes, more shared rows than there can be, parameters that student
    and teacher share, which are frozen with the teacher, or one and the same frozen encoder in both, for which switch
    and feature term would be exactly zero.
    """

    frozen = ("teacher",)

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        align: str | Divergence | None = "dbild",
        switch: str | Divergence | None = "dbild",
        feature: str | Divergence | None = None,
        align_weight: float = 1.0,
        switch_weight: float = 1.0,
        feature_weight: float = 1.0,
        align_options: Mapping | None = None,
        switch_options: Mapping | None = None,
        shared_vocab: int | None = None,
        switch_adapter: nn.Module | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.align = _divergence("align", align, align_options)
        self.switch = _divergence("switch", switch, switch_options)
        self.feature = _distance(feature)
        self.weights = {"ce": 1.0, "align": align_weight, "switch": switch_weight, "feature": feature_weight}
        self.shared_vocab = shared_rows(student, teacher, shared_vocab)
        self._readers = [name for name in ("switch", "feature") if getattr(self, name) is not None]
        check_apart(student, teacher, switch_adapter)
        check_features_meet(student, teacher, switch_adapter, self._readers, equal_widths=feature == "cosine")
        check_encoders_move(student, teacher, self._readers)
        self.switch_adapter = switch_adapter
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            recompute_activations(teacher)
        self.train(self.training)

    def train(self, mode: bool = True) -> SwitchKD:
        """The teacher stays in eval mode, whatever the mode."""
        super().train(mode)
        self.teacher.eval()
        if self.gradient_checkpointing:
            # Layers checkpoint only while their own flag says training; set on the layer alone, so that dropout inside
            # stays off.
            for layer in self.teacher.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = mode
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Terms:
        """input_ids, attention_mask, labels [batch, time]; pixel_values [images, 3, height, width] or None.

        Named terms: "ce", and "align", "switch" and "feature" where they are on; each is a sum over answer positions
        divided by `num_items_in_batch`, the answer tokens of the whole optimizer step (without it, the batch's own).
        Raises ValueError for a batch of other shapes, for image tokens that are not those of the pictures, and where
        the student's vision tower has been frozen since the pair was made.
        """
        check_batch(self.student, input_ids, attention_mask, pixel_values, labels)
        student, teacher = pathway_of(self.student), pathway_of(self.teacher)
        image_token_id = self.student.config.image_token_id
        blank = pixel_values is None
        if blank:
            pixel_values = student.blank_pixels(like=input_ids)
        features = student.encode(pixel_values)
        hidden = student.decode(input_ids, attention_mask, student.project(features), blank=blank)
        student_rows, targets = answer_rows(hidden, labels)

        given, wanted = student.visual_token_count, teacher.visual_token_count
        read = (input_ids, attention_mask, labels)  # by the teacher
        if given != wanted:
            read = with_image_tokens(*read, image_token_id, given=given, wanted=wanted)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            check_features_train(features, self._readers)
        if self.switch_adapter is not None:
            features = self.switch_adapter(features)
            if learns:
                check_features_train(features, self._readers)

        teacher_rows = switch_rows = None
        if self.align is not None or self.switch is not None or self.feature is not None:
            with torch.no_grad():
                teacher_features = teacher.encode(pixel_values)
        if self.align is not None or self.switch is not None:
            with torch.no_grad():
                teacher_rows = self._read_by_teacher(*read, teacher_features, blank)
        if self.switch is not None:
            switch_rows = self._read_by_teacher(*read, features, blank)

        sums = answer_terms(
            student_rows,
            student.head,
            targets,
            teacher_hidden=teacher_rows,
            switch_hidden=switch_rows,
            teacher_head=teacher.head,
            align=self.align,
            switch=self.switch,
            shared_vocab=self.shared_vocab,
            **chunking(targets, student.head, teacher.head),
        )
        if self.feature is not None:
            images = images_per_sample(input_ids, image_token_id, given)
            sums["feature"] = self._feature_sum(features, teacher_features, losses.image_weights(labels, images))
        return over_answer_tokens(sums, self.weights, targets, num_items_in_batch)

    def _read_by_teacher(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, features: Tensor, blank: bool
    ) -> Tensor:
        """[answer tokens, hidden size of the teacher]: its states at the answer positions, over these features."""
        teacher, image_token_id = pathway_of(self.teacher), self.student.config.image_token_id
        visual_tokens = teacher.project(features)
        hidden = teacher.decode(input_ids, attention_mask, visual_tokens, image_token_id=image_token_id, blank=blank)
        return answer_rows(hidden, labels)[0]

    def _feature_sum(self, features: Tensor, teacher_features: Tensor, weights: Tensor) -> Tensor:
        values = self.feature(features, teacher_features)
        if values.shape != features.shape[:1]:
            raise ValueError(
                f"feature returned shape {tuple(values.shape)} for {len(features)} images: it must give one value an "
                f"image, shape ({len(features)},), neither summed nor averaged"
            )
        # A batch without images has no weights; its blank one counts nothing, but stays in the graph.
        return values[: len(weights)].float() @ weights

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The answer tokens of a batch, which its loss is a mean over."""
        return answer_tokens(batch["labels"])

    def progress(self, fraction: float) -> None:
        """Called by the trainer before each step with the run's fraction done, 0 to 1. Nothing here depends on it."""


def _divergence(field: str, choice: str | Divergence | None, options: Mapping | None) -> Divergence | None:
    options = dict(options or {})
    if choice is None:
        if options:
            raise ValueError(f"{field}_options is {options} but {field} is None: name a divergence or drop the options")
        return None
    if isinstance(choice, str):
        try:
            choice = divergence(choice)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
        known = list(inspect.signature(choice).parameters)[2:]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"{field}_options: {choice.__name__} has no option {unknown}; it has {', '.join(known)}")
        _try(field, choice, options)
    return functools.partial(choice, **options) if options else choice


def _try(field: str, choice: Divergence, options: dict) -> None:
    """What a divergence cannot take, or gives in another shape, is refused here and not at step 1."""
    rows = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 0.0, 2.0]])
    try:
        values = choice(rows, rows.flip(0), **options)
    except TypeError as error:
        raise ValueError(f"{field}_options is {options}: {error}; give numbers where numbers are due") from error
    if getattr(values, "shape", None) != rows.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{field}: {choice.__name__} of two rows [2, 4] gave {given}, and it must give [2], one a row")


def _distance(feature: str | Divergence | None) -> Divergence | None:
    if isinstance(feature, str):
        if feature not in FEATURES:
            raise ValueError(
                f"feature is {feature!r}; known are {', '.join(FEATURES)}, or pass a function [images, tokens, width], "
                "[images, tokens, width] -> [images]"
            )
        return FEATURES[feature]
    return feature
