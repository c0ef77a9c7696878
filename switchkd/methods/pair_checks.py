"""What a student and its teacher must have in common for the terms of a method, checked before any training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.models.pathway import pathway_of

logger = logging.getLogger(__name__)


def shared_rows(student: PreTrainedModel, teacher: PreTrainedModel, shared_vocab: int | None) -> int:
    """`shared_vocab`, or all rows where it is None; ValueError where these cannot mean the same to both."""
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


def check_features_meet(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    adapter: nn.Module | None,
    readers: Sequence[str],
    *,
    equal_widths: bool,
) -> None:
    """ValueError unless the terms `readers` ("switch", "feature") can set the student's vision features beside the
    teacher's, through `adapter` where there is one.

    equal_widths: whether the feature term needs them; the switch does.
    """
    models = (student, teacher)
    visions = [model.config.vision_config for model in models]
    tokens = [pathway_of(model).visual_token_count for model in models]
    widths = [pathway_of(model).feature_width for model in models]
    shown = [
        f"{v.image_size} px in patches of {v.patch_size}, {n} tokens" for v, n in zip(visions, tokens, strict=True)
    ]
    if visions[0].image_size != visions[1].image_size:
        raise ValueError(
            f"one encoded picture is read by student and teacher; the student has {shown[0]}, the teacher {shown[1]}: "
            "take vision towers of one image size"
        )
    if adapter is not None:
        _check_adapter(adapter, tokens, widths, readers)
        return
    drop = f"set {' and '.join(readers)} to None"
    if readers and tokens[0] != tokens[1]:
        raise ValueError(
            "student and teacher must see an image as equally many visual tokens for the "
            f"{' and '.join(readers)} term; the student has {shown[0]}, the teacher {shown[1]}: take vision towers of "
            "one image and patch size, and one vision_feature_select_strategy, give a switch_adapter (linear), or "
            f"{drop}"
        )
    if widths[0] != widths[1] and ("switch" in readers or equal_widths):
        raise ValueError(
            f"the student's vision features are {widths[0]} wide and the teacher's projector reads {widths[1]}: the "
            f"{' and '.join(readers)} term needs equal widths; take a tower of the teacher's width, give a "
            f"switch_adapter (linear), or {drop}"
        )


def _check_adapter(adapter: nn.Module, tokens: list[int], widths: list[int], readers: Sequence[str]) -> None:
    if not readers:
        raise ValueError("switch_adapter is given but switch and feature are None, and no other term reads it: drop it")
    if tokens[0] == tokens[1] and widths[0] == widths[1]:
        raise ValueError(
            f"switch_adapter is given but student and teacher both have {tokens[0]} visual tokens of width "
            f"{widths[0]}: there is nothing to adapt, drop it"
        )
    parameters = list(adapter.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"switch_adapter is frozen, all {len(parameters)} parameters of it, and it trains along with the student's "
            "vision tower: unfreeze it (requires_grad_)"
        )
    parameter = next(iter(parameters), torch.empty(0))
    training = adapter.training
    with torch.no_grad():
        probe = adapter.eval()(parameter.new_zeros(1, tokens[0], widths[0]))
    adapter.train(training)
    if probe.shape != (1, tokens[1], widths[1]):
        raise ValueError(
            f"switch_adapter makes {tuple(probe.shape)} of the student's features {(1, tokens[0], widths[0])}, and the "
            f"teacher's are {(1, tokens[1], widths[1])}: fit it to this pair (switchkd.models.adapter)"
        )


def check_apart(student: PreTrainedModel, teacher: PreTrainedModel, adapter: nn.Module | None) -> None:
    """ValueError where the teacher holds parameters, or their memory, that the student or the adapter holds too: it is
    frozen, and they would be with it, without a word."""
    theirs = {key for parameter in teacher.parameters() for key in _memory(parameter)}
    for whose, module in (("student", student), ("switch adapter", adapter)):
        named = module.named_parameters() if module is not None else ()
        shared = [name for name, parameter in named if not theirs.isdisjoint(_memory(parameter))]
        if shared:
            raise ValueError(
                f"{whose} and teacher share {len(shared)} parameters, the first {shared[0]}, and the teacher is "
                f"frozen, so that these would not train: give the {whose} its own (copy.deepcopy, or load them again)"
            )


def _memory(parameter: nn.Parameter) -> tuple[int, ...]:
    """What tells that two are one: the parameter itself, and its storage where that is not empty, as under ZeRO-3."""
    return (id(parameter), parameter.untyped_storage()._cdata) if parameter.numel() else (id(parameter),)


def check_features_train(features: Tensor, readers: Sequence[str]) -> None:
    """ValueError where `features`, what the terms `readers` read of the student in training, carry no gradient back to
    its vision tower: they train that alone."""
    if readers and not features.requires_grad:
        name = " and ".join(readers)
        raise ValueError(
            f"the {name} term trains the student's vision tower, and no gradient reaches that: it has been frozen "
            f"since the pair was made, or runs without gradients; unfreeze it (requires_grad_), or set {name} to None"
        )


def check_encoders_move(student: PreTrainedModel, teacher: PreTrainedModel, readers: Sequence[str]) -> None:
    """ValueError where the terms `readers` would train nothing of the student: its vision tower is frozen, and they
    train that alone. One line of warning where it starts equal to the teacher's."""
    if not readers:
        return
    paths = [pathway_of(model) for model in (student, teacher)]
    towers = [path.part("vision_tower") for path in paths]
    states = [tower.state_dict() for tower in towers]
    equal = (
        paths[0].feature_layers == paths[1].feature_layers
        and states[0].keys() == states[1].keys()
        and all(
            states[0][name].shape == states[1][name].shape
            and torch.equal(states[0][name].to(states[1][name]), states[1][name])
            for name in states[0]
        )
    )
    frozen = not any(parameter.requires_grad for parameter in towers[0].parameters())
    name = " and ".join(readers)
    if frozen and equal:
        raise ValueError(
            f"student and teacher share one frozen vision tower, so they see the same and the {name} term is exactly "
            f"zero: unfreeze the student's vision tower, start it from other weights, or set {name} to None"
        )
    if frozen:
        raise ValueError(
            f"the {name} term trains the student's vision tower alone, and that is frozen: unfreeze it, or set {name} "
            "to None"
        )
    if equal:
        logger.warning(
            "student and teacher start from equal vision towers: the %s term begins at zero and acts once the "
            "student's tower moves",
            name,
        )
