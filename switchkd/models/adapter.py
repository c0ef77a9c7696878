"""A linear map between the features of two vision towers, so that another tower can enter the visual switch.

Ours; the paper takes towers of one width and one number of visual tokens. A student's narrower tower is fitted onto the
teacher's features once, in closed form, and the map is then trained along with the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.models.pathway import pathway_of


class LinearAdapter(nn.Module):
    """Student's visual tokens on the teacher's grid, then one affine map of their width for all of them.

    student_width, teacher_width: of the features that the two pathways' `encode` gives. student_tokens, teacher_tokens:
    for one image. Other numbers of tokens are resampled between the two square grids, with weights that are fixed, not
    trained: antialiased bilinear interpolation, which averages where the teacher's grid is the coarser one.
    Raises ValueError where the two numbers differ and one of them is no square.

    r2: the share of the variance of the teacher's features that `fit_switch_adapter` explained; None before a fit.
    """

    def __init__(self, student_width: int, teacher_width: int, student_tokens: int, teacher_tokens: int):
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width)
        resampling = None
        if student_tokens != teacher_tokens:
            resampling = _resampling(_side("student", student_tokens), _side("teacher", teacher_tokens))
        self.register_buffer("resampling", resampling, persistent=False)  # [teacher_tokens, student_tokens]
        self.r2: float | None = None

    @classmethod
    def between(cls, student: PreTrainedModel, teacher: PreTrainedModel) -> LinearAdapter:
        """An adapter of the pair's widths and numbers of visual tokens, at its random start."""
        ours, theirs = pathway_of(student), pathway_of(teacher)
        return cls(ours.feature_width, theirs.feature_width, ours.visual_token_count, theirs.visual_token_count)

    def forward(self, features: Tensor) -> Tensor:
        """[images, student's tokens, student's width] -> [images, teacher's tokens, teacher's width]."""
        features = self.on_teacher_grid(features)
        return self.linear(features.to(self.linear.weight.dtype))

    def on_teacher_grid(self, features: Tensor) -> Tensor:
        """[images, student's tokens, width] -> [images, teacher's tokens, width]."""
        if self.resampling is None:
            return features
        return self.resampling.to(features.dtype) @ features


@torch.no_grad()
def fit_switch_adapter(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pixel_values_batches: Iterable[Tensor],
    *,
    ridge: float = 1e-6,
) -> LinearAdapter:
    """The adapter that maps the student's features onto the teacher's with the least squared error, bias included.

    pixel_values_batches: pictures as both towers read them, each batch [images, 3, height, width]; a few hundred
        images hold tokens enough. Both towers see them in eval mode, on the devices where they are.
    ridge: added to the diagonal of the features' covariance, as a share of its mean; it decides only where features
        hardly vary.

    Closed form over all token pairs in float64; sums of a batch are added up, so that memory does not grow with the
    images, and the same pictures give the same adapter. It is float32, on the student's device, and its `r2` says how
    well it fits. Raises ValueError without a picture, and where the features are not finite or the teacher's do not
    vary.
    """
    paths = [pathway_of(model) for model in (student, teacher)]
    towers = [path.part("vision_tower") for path in paths]
    device = towers[0].device
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    adapter = LinearAdapter.between(student, teacher).to(device)
    modes = [tower.training for tower in towers]
    for tower in towers:
        tower.eval()
    # Of the tokens [1, x, y] side by side: number, sums and products in one matrix.
    moments: Tensor | float = 0.0
    for pixel_values in pixel_values_batches:
        ours, theirs = (
            path.encode(pixel_values.to(tower.device)).to(device, torch.float64)
            for path, tower in zip(paths, towers, strict=True)
        )
        ours, theirs = adapter.on_teacher_grid(ours).flatten(0, 1), theirs.flatten(0, 1)
        tokens = torch.cat([torch.ones_like(ours[:, :1]), ours, theirs], dim=1)
        moments = moments + tokens.mT @ tokens
    for tower, mode in zip(towers, modes, strict=True):
        tower.train(mode)
    if not isinstance(moments, Tensor):
        raise ValueError("a switch adapter is fitted on pictures and the samples hold none: drop switch_adapter")
    weight, bias, adapter.r2 = _least_squares(moments, adapter.linear.in_features, ridge)
    adapter.linear.weight.copy_(weight)
    adapter.linear.bias.copy_(bias)
    return adapter.to(towers[0].device)


def _least_squares(moments: Tensor, width: int, ridge: float) -> tuple[Tensor, Tensor, float]:
    """weight [teacher's width, width], bias [teacher's width], R2, from the summed products of [1, x, y]."""
    mean = moments[0, 1:] / moments[0, 0]
    covariance = moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean)
    xx, xy, yy = covariance[:width, :width], covariance[:width, width:], covariance[width:, width:]
    total = float(yy.trace())
    if not (math.isfinite(total) and bool(torch.isfinite(xx).all()) and total > 0):
        raise ValueError(
            f"the variance of the teacher's vision features is {total} and the student's mean {float(xx.trace())}: a "
            "switch adapter cannot be fitted onto them, so look at the two vision towers' weights"
        )
    floor = ridge * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    solved = torch.linalg.solve(xx + floor * torch.eye(width, dtype=xx.dtype, device=xx.device), xy)
    residual = total - float(2 * (solved * xy).sum() - (solved * (xx @ solved)).sum())
    return solved.mT, mean[width:] - mean[:width] @ solved, 1.0 - residual / total


def _side(role: str, tokens: int) -> int:
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(
            f"the {role} gives {tokens} visual tokens, which are no square grid that an adapter could resample: a "
            "tower with a class token (CLIP) needs vision_feature_select_strategy default, one without (SigLIP) full"
        )
    return side


def _resampling(source: int, target: int) -> Tensor:
    """Weights [target^2, source^2] between square grids of these sides; each row sums to 1.

    As a matrix its backward is a matrix product too, which is deterministic on a GPU; that of interpolate is not.
    """
    pixels = torch.eye(source**2).unflatten(1, (1, source, source))
    weights = F.interpolate(pixels, size=(target, target), mode="bilinear", antialias=True)
    return weights.flatten(1).mT.contiguous()
