"""Switch-KD (arXiv 2604.14629): the teacher reads the student's visual features.

    z_T      = L_T(P_T(V_T(image)), text)      teacher logits, no gradient
    z_S      = L_S(P_S(V_S(image)), text)      student logits
    z_switch = L_T(P_T(V_S(image)), text)      switch logits, gradient on           (Eq. 5)
    loss     = CE(z_S) + align_weight * D(z_T, z_S) + switch_weight * D(z_T, z_switch)   (Eq. 1, 4, 6)

V is the vision tower, P the projector, L the language model; D is DBiLD in the paper. Which parts are frozen, what is
switched and what it is compared with follow the official figure and README; equation numbers, weights and temperature
are as reported by public notes and ports, for the paper's own text was not read.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from switchkd import losses
from switchkd.losses.answers import answer_rows, answer_terms
from switchkd.methods.terms import Terms, chunking, over_answer_tokens
from switchkd.models import pathway
from switchkd.models.llava import recompute_activations

logger = logging.getLogger(__name__)

Divergence = Callable[[Tensor, Tensor], Tensor]

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "dbild": losses.dbild_loss,
    "bild": losses.bild_loss,
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.jsd,
}


class SwitchKD(nn.Module):
    """Trains `student` against a frozen `teacher` over three passes of the same answer positions.

    student, teacher: LLaVA models over one vocabulary; the teacher is frozen here and kept in eval mode. It reads what
        the student's processor encoded, so `<image>` and padding may have other ids in it, or none.
    align, switch: the divergence of z_S and of z_switch from z_T: a name of `DIVERGENCES`, your own function
        [N, V] (student or switch logits), [N, V] (teacher logits) -> [N], or None to leave the term and its pass out.
    align_weight, switch_weight: lambda 1 and 2 of Eq. 1; 1.0 and 1.0 as reported of the paper.
    align_options, switch_options: keyword arguments of the divergence, such as {"temperature": 3.0}.
    shared_vocab: logits are cut to the first `shared_vocab` rows before a divergence sees them; None: all rows, which
        then must be equally many. `switchkd.models.shared_vocab` finds it from the two tokenizers. It ends before
        `<image>` where that has other ids in student and teacher.
    gradient_checkpointing: recompute the teacher's activations on the switch pass instead of keeping them.

    The gradient of the switch term reaches the student's vision tower alone: projector and language model on that
    path are the teacher's. Raises ValueError where the pair cannot be switched: towers of other widths, another
    number of visual tokens, more shared rows than there can be, or one and the same frozen encoder in both, for which
    the switch term would be exactly zero.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        student: LlavaForConditionalGeneration,
        teacher: LlavaForConditionalGeneration,
        *,
        align: str | Divergence | None = "dbild",
        switch: str | Divergence | None = "dbild",
        align_weight: float = 1.0,
        switch_weight: float = 1.0,
        align_options: Mapping | None = None,
        switch_options: Mapping | None = None,
        shared_vocab: int | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.align = _divergence("align", align, align_options)
        self.switch = _divergence("switch", switch, switch_options)
        self.weights = {"ce": 1.0, "align": align_weight, "switch": switch_weight}
        self.shared_vocab = _shared_rows(student, teacher, shared_vocab)
        _check_pair(student, teacher, switched=self.switch is not None)
        if self.switch is not None:
            _check_encoders_move(student, teacher)
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

        Named terms: "ce", and "align" and "switch" where they are on; each is a sum over answer positions divided by
        `num_items_in_batch`, the answer tokens of the whole optimizer step (without it, the batch's own).
        """
        student, teacher = self.student, self.teacher
        image_token_id = student.config.image_token_id
        if pixel_values is None:
            pixel_values = pathway.blank_pixels(student, like=input_ids)
        features = pathway.encode(student, pixel_values)
        hidden = pathway.decode(student, input_ids, attention_mask, pathway.project(student, features))
        student_rows, targets = answer_rows(hidden, labels)

        teacher_rows = switch_rows = None
        if self.align is not None or self.switch is not None:
            with torch.no_grad():
                visual_tokens = pathway.project(teacher, pathway.encode(teacher, pixel_values))
                hidden = pathway.decode(
                    teacher, input_ids, attention_mask, visual_tokens, image_token_id=image_token_id
                )
                teacher_rows, _ = answer_rows(hidden, labels)
        if self.switch is not None:
            visual_tokens = pathway.project(teacher, features)
            hidden = pathway.decode(teacher, input_ids, attention_mask, visual_tokens, image_token_id=image_token_id)
            switch_rows, _ = answer_rows(hidden, labels)

        sums = answer_terms(
            student_rows,
            student.lm_head,
            targets,
            teacher_hidden=teacher_rows,
            switch_hidden=switch_rows,
            teacher_head=teacher.lm_head,
            align=self.align,
            switch=self.switch,
            shared_vocab=self.shared_vocab,
            **chunking(targets, student.lm_head, teacher.lm_head),
        )
        return over_answer_tokens(sums, self.weights, targets, num_items_in_batch)

    def progress(self, fraction: float) -> None:
        """Called by the trainer before each step with the run's fraction done, 0 to 1. Nothing here depends on it."""


def _divergence(field: str, choice: str | Divergence | None, options: Mapping | None) -> Divergence | None:
    options = dict(options or {})
    if choice is None:
        if options:
            raise ValueError(f"{field}_options is {options} but {field} is None: name a divergence or drop the options")
        return None
    if isinstance(choice, str):
        if choice not in DIVERGENCES:
            raise ValueError(
                f"{field} is {choice!r}; known are {', '.join(DIVERGENCES)}, or pass a function [N, V], [N, V] -> [N]"
            )
        choice = DIVERGENCES[choice]
        known = list(inspect.signature(choice).parameters)[2:]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"{field}_options: {choice.__name__} has no option {unknown}; it has {', '.join(known)}")
        try:  # options out of range are refused here, not at step 1
            choice(torch.zeros(1, 4), torch.zeros(1, 4), **options)
        except TypeError as error:
            raise ValueError(f"{field}_options is {options}: {error}; give numbers where numbers are due") from error
    return functools.partial(choice, **options) if options else choice


def _shared_rows(student, teacher, shared_vocab: int | None) -> int:
    rows = [model.config.text_config.vocab_size for model in (student, teacher)]
    if shared_vocab is None:
        if rows[0] != rows[1]:
            raise ValueError(
                f"the student has {rows[0]} vocabulary rows and the teacher {rows[1]}: pass shared_vocab, the number "
                "of leading rows that mean the same token to both (switchkd.models.shared_vocab finds it)"
            )
        shared_vocab = rows[0]
    if not 0 < shared_vocab <= min(rows):
        raise ValueError(f"shared_vocab is {shared_vocab}; the student has {rows[0]} rows, the teacher {rows[1]}")
    image_ids = [model.config.image_token_id for model in (student, teacher)]
    if image_ids[0] != image_ids[1] and shared_vocab > min(image_ids):
        raise ValueError(
            f"the image token is {image_ids[0]} in the student and {image_ids[1]} in the teacher, so that "
            f"{shared_vocab} leading rows cannot mean the same to both: pass shared_vocab, at most {min(image_ids)} "
            "(switchkd.models.shared_vocab finds it)"
        )
    return shared_vocab


def _check_pair(student, teacher, switched: bool) -> None:
    visions = [model.config.vision_config for model in (student, teacher)]
    tokens = [pathway.visual_token_count(model) for model in (student, teacher)]
    if tokens[0] != tokens[1] or visions[0].image_size != visions[1].image_size:
        sizes = [
            f"{v.image_size} px in patches of {v.patch_size}, {n} tokens" for v, n in zip(visions, tokens, strict=True)
        ]
        raise ValueError(
            f"student and teacher must see an image as equally many visual tokens; the student has {sizes[0]}, the "
            f"teacher {sizes[1]}: take vision towers of one image and patch size, and one "
            "vision_feature_select_strategy"
        )
    widths = [_feature_width(model) for model in (student, teacher)]
    if switched and widths[0] != widths[1]:
        raise ValueError(
            f"the student's vision features are {widths[0]} wide and the teacher's projector reads {widths[1]}: the "
            "visual switch needs equal widths; take a tower of the teacher's width, or set switch to None"
        )


def _feature_width(model) -> int:
    layers = model.config.vision_feature_layer
    return model.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _check_encoders_move(student, teacher) -> None:
    towers = [model.model.vision_tower for model in (student, teacher)]
    states = [tower.state_dict() for tower in towers]
    layers = [model.config.vision_feature_layer for model in (student, teacher)]
    equal = (
        layers[0] == layers[1]
        and states[0].keys() == states[1].keys()
        and all(
            states[0][name].shape == states[1][name].shape
            and torch.equal(states[0][name].to(states[1][name]), states[1][name])
            for name in states[0]
        )
    )
    frozen = not any(parameter.requires_grad for parameter in towers[0].parameters())
    if frozen and equal:
        raise ValueError(
            "student and teacher share one frozen vision tower, so the switch logits equal the teacher's and the "
            "switch term is exactly zero: unfreeze the student's vision tower, start it from other weights, or set "
            "switch to None"
        )
    if frozen:
        raise ValueError(
            "the switch term trains the student's vision tower alone, and that is frozen: unfreeze it, or set switch "
            "to None"
        )
    if equal:
        logger.warning(
            "student and teacher start from equal vision towers: the switch term begins at zero and acts once the "
            "student's tower moves"
        )
