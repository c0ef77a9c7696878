"""Learning rates: of the parts of a model that have their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from switchkd.config import TrainConfig


def part_rates(config: TrainConfig) -> dict[str, float]:
    """Learning rates of the parts that have their own: parameter name prefix -> rate."""
    rates = {"vision_tower": config.encoder_lr, "multi_modal_projector": config.projector_lr}
    return {f"student.model.{part}": rate for part, rate in rates.items() if rate is not None}


def parameter_groups(
    model: nn.Module, decayed: Collection[str], part_rates: Mapping[str, float], args: TrainingArguments
) -> list[dict[str, Any]]:
    """The trained parameters of `model` as an optimizer takes them, in groups of one rate and one decay.

    decayed: names of the parameters that weight decay pulls. part_rates: rates by parameter name prefix; the longest
    prefix wins, the rest has `args.learning_rate`. Raises ValueError for a prefix under which nothing is trained.
    """
    # The rest comes first: Trainer logs the first group's rate.
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {("", True): [], ("", False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = max((p for p in part_rates if f"{name}.".startswith(f"{p}.")), key=len, default="")
            groups.setdefault((part, name in decayed), []).append(parameter)
    for part in part_rates:
        if (part, True) not in groups and (part, False) not in groups:
            parts = sorted({".".join(n.split(".")[:3]) for n, p in model.named_parameters() if p.requires_grad})
            raise ValueError(
                f"a learning rate is given for {part!r}, where nothing is trained; trained are {', '.join(parts)}"
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
