"""Learning rates: of the parts of a model that have their own, and how they fall at milestones."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments


def parameter_groups(
    model: nn.Module,
    decayed: Collection[str],
    part_rates: Mapping[str, float],
    parts: Mapping[str, Sequence[str]] | None,
    args: TrainingArguments,
) -> list[dict[str, Any]]:
    """The trained parameters of `model` as an optimizer takes them, in groups of one rate and one decay.

    decayed: names of the parameters that weight decay pulls. part_rates: rates by part; the rest has
    `args.learning_rate`. parts: the parameter name prefixes of each part; None: the name of a part is its prefix. The
    longest prefix wins. Raises ValueError for a rate of an unknown part, or of one in which nothing is trained.
    """
    if unknown := [part for part in part_rates if parts is not None and part not in parts]:
        raise ValueError(f"a learning rate is given for {unknown[0]!r}, which is no part; known are {', '.join(parts)}")
    prefixes = {prefix: part for part in part_rates for prefix in (parts[part] if parts is not None else [part])}
    # The rest comes first: Trainer logs the first group's rate.
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {("", True): [], ("", False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = max((p for p in prefixes if f"{name}.".startswith(f"{p}.")), key=len, default=None)
            groups.setdefault((prefixes.get(prefix, ""), name in decayed), []).append(parameter)
    for part in part_rates:
        if (part, True) not in groups and (part, False) not in groups:
            trained = sorted({".".join(n.split(".")[:3]) for n, p in model.named_parameters() if p.requires_grad})
            raise ValueError(
                f"a learning rate is given for {part!r}, where nothing is trained; trained are {', '.join(trained)}"
            )
    return [
        {
            "params": parameters,
            "lr": part_rates.get(part, args.learning_rate),
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (part, decay), parameters in groups.items()
        if parameters
    ]


def milestone_steps(milestones: Sequence[float], steps: int) -> list[int]:
    """Milestones as optimizer steps: those below 1 are shares of all `steps`."""
    return [round(each * steps) if each < 1 else int(each) for each in milestones]


def at_milestones(optimizer: Optimizer, milestones: Sequence[int], factor: float, warmup: int) -> LambdaLR:
    """The rate rises over `warmup` steps and is multiplied by `factor` after each of `milestones`, in steps."""
    return LambdaLR(optimizer, partial(_share_of_the_peak, milestones=milestones, factor=factor, warmup=warmup))


def _share_of_the_peak(step: int, *, milestones: Sequence[int], factor: float, warmup: int) -> float:
    rising = min(1.0, step / warmup) if warmup else 1.0
    return rising * factor ** bisect.bisect_right(milestones, step)
