"""Losses between vision features, one value an image: the cheap rivals of the visual switch.

All take the student's and the teacher's features, [images, tokens, width], and return [images], computed in float32
(float64 where the features are). They are 0 where the features point the same way, and 2 at most. ValueError where the
shapes do not fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the student's and the teacher's feature of one visual token, mean over tokens."""
    _check(student, teacher, student.shape == teacher.shape, "of one shape")
    return (1.0 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)).mean(-1)


def token_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of two matrices: how alike each visual token is to each other one, in the student and in the teacher.

    An entry [i, j] is the cosine of the features of tokens i and j of one model, so the two widths may differ. After
    the relation distillation of LLaVA-KD (arXiv 2410.16236), which takes the visual tokens further on, out of the
    language model; on the encoder's features it is ours.
    """
    _check(student, teacher, student.shape[:2] == teacher.shape[:2], "of equally many images and tokens")
    relations = [_relations(features).flatten(1) for features in (student, teacher)]
    return 1.0 - F.cosine_similarity(*relations, dim=-1)


def image_weights(labels: Tensor, images: Tensor) -> Tensor:
    """What each image's value counts in a sum over answer tokens: its sample's answer tokens over its sample's images.

    labels [batch, time] with -100 off the answer; images [batch], how many each sample has -> [images of the batch], in
    the samples' order, float32. So each answer token counts the mean over its sample's images, and the sum divided by
    the answer tokens of an optimizer step is the same however the samples are split into batches; a sample without
    images adds nothing.
    """
    answers = (labels[:, 1:] != -100).sum(1).float()
    return (answers / images.clamp(min=1)).repeat_interleave(images)


def _relations(features: Tensor) -> Tensor:
    """[images, tokens, width] -> cosines [images, tokens, tokens]."""
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 products would hide small differences
        directions = F.normalize(_wide(features), dim=-1)
        return directions @ directions.mT


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _check(student: Tensor, teacher: Tensor, fits: bool, rule: str) -> None:
    if student.dim() != 3 or teacher.dim() != 3 or not fits:
        raise ValueError(
            f"the student's features are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: both must be "
            f"[images, tokens, width] {rule}; a switch_adapter makes them so"
        )
