"""The variants: what each adds to the student's cross entropy, and why it should help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from eval.records import Refused, named
from eval.ten_skills.own_methods import LlavaKD, Scheduled, SeenOnly
from switchkd.losses.named import divergence
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.models.adapter import fit_switch_adapter


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the tables.

    options: of `SwitchKD`; None is cross entropy alone. align and switch may be functions of yours that a module holds
    by name, or "package.module:function"; settings know them by their source (`eval.records.named`). lr: times the
    size's rate. freeze: parts of the student. blank: trained and judged with blank pictures. equal_flops: as many steps
    as the paper's variant has arithmetic. narrow: the student's tower is narrower than the teacher's and enters the
    switch through a fitted adapter. kind: the method, where it is one of the bench's own; options are its.
    """

    name: str
    why: str
    options: Mapping[str, Any] | None = None
    lr: float = 1.0
    freeze: tuple[str, ...] = ()
    blank: bool = False
    equal_flops: bool = False
    narrow: bool = False
    kind: type[SwitchKD] = SwitchKD
    starts: tuple[str, ...] = ("apart", "teacher")

    def settings(self) -> dict:
        """What decides a run's result."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("name", "why", "starts")}
        if self.options is not None:
            # A name of a function says nothing of its source.
            kept["options"] = {key: divergence(each) if _is_own(each) else each for key, each in self.options.items()}
        return kept | {"kind": self.kind.__name__}

    def method(
        self, student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, pixels: Tensor
    ) -> nn.Module:
        """pixels [images, 3, S, S]: a few hundred pictures that an adapter is fitted on."""
        if self.options is None:
            return SupervisedMethod(student)
        options = dict(self.options)
        if self.narrow:
            options["switch_adapter"] = fit_switch_adapter(student, teacher, [pixels])
        return self.kind(student, teacher, **options)


def _is_own(value: Any) -> bool:
    """Whether an option is "package.module:function"."""
    return isinstance(value, str) and ":" in value


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
            "relations of the encoder's features beside the align term",
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
    "visual": (
        Variant(
            "kl_visual",
            "LLaVA-KD: the student's language model also says at an image token what the teacher's says there",
            {**_pair("forward_kl", None), "visual_weight": 1.0},
            kind=LlavaKD,
            starts=_APART,
        ),
        Variant(
            "llava_kd",
            "LLaVA-KD whole: and the image tokens are alike where the teacher's are",
            {**_pair("forward_kl", None), "visual_weight": 1.0, "relation_weight": 0.5},
            kind=LlavaKD,
            starts=_APART,
        ),
    ),
    "schedule": (
        Variant("kl_early", "the teacher leads first", {**_KL, "late": False}, kind=Scheduled, starts=_APART),
        Variant("kl_late", "the teacher leads last", {**_KL, "late": True}, kind=Scheduled, starts=_APART),
    ),
    "seen": (
        Variant(
            "kl_seen", "only positions where the picture matters to the teacher", _KL, kind=SeenOnly, starts=_APART
        ),
        Variant("paper_seen", "as above, for the paper's terms", _PAPER, kind=SeenOnly, starts=_APART),
    ),
}
VARIANTS: dict[str, Variant] = {variant.name: variant for piece in PIECES.values() for variant in piece}


def variant(name: str) -> Variant:
    """One of VARIANTS, or for "package.module:function" the paper's setting with that divergence for both terms.

    Raises Refused for an unknown name, and where the function is not there or has no name (`eval.records.named`).
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if not _is_own(name):
        near = difflib.get_close_matches(name, VARIANTS, 1)
        raise Refused(
            f"unknown variant {name!r}{f' (did you mean {near[0]}?)' if near else ''}: give one of "
            f"{', '.join(VARIANTS)}, or a function of yours as package.module:function"
        )
    try:
        named(divergence(name))
    except ValueError as error:
        raise Refused(str(error)) from error
    return Variant(name, "a divergence of your own for both terms", _pair(name, name), starts=_APART)


def listens(name: str) -> bool:
    """Whether the variant has a teacher to listen to, with a tower of its width: the best is sought among these."""
    known = VARIANTS.get(name)
    return known is None or (known.options is not None and not known.narrow)


# The rows that say most, for a size that has no time for all.
PIECES["few"] = tuple(
    replace(VARIANTS[name], starts=starts)
    for name, starts in {
        "sft": ("apart", "teacher"),
        "switch_kd": ("apart", "teacher"),
        **dict.fromkeys(("sft_low_lr", "sft_equal_flops", "blind", "kl_align", "dbild_align"), _APART),
        **dict.fromkeys(("feature_cosine", "kl_switch"), _APART),
    }.items()
)

SFT = ("sft", "sft_low_lr", "sft_high_lr")  # the table shows the best of those that have run
