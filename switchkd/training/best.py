"""The best checkpoint of a run, by a measurement of its evaluations, the lower the better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from switchkd.training.checkpoints import load_state
from switchkd.training.resume import refuse_torn


def best_step(history: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The step whose `metric` is lowest in the records of `history`, the first of equal ones; None where no record has
    a finite one. The history is part of a checkpoint's state, so that a resumed run knows what was best before."""
    found = [(record[metric], record["step"]) for record in history if math.isfinite(record.get(metric, math.nan))]
    return min(found)[1] if found else None


def take_best(method: nn.Module, state: TrainerState, metric: str, folder: Path, first: bool) -> str:
    """Load the checkpoint of `folder` whose `metric` was lowest into `method`, which is that of the last step; all
    ranks call this, the `first` one looks whether it is whole. Returns a sentence that says which it is."""
    best = best_step(state.log_history, metric)
    if best is None:
        raise ValueError(f"{metric} was never measured as a number: there is no best checkpoint")
    if best != state.global_step:
        refuse_torn(folder / f"checkpoint-{best}", first)
        load_state(method, folder / f"checkpoint-{best}")
    value = next(record[metric] for record in state.log_history if record["step"] == best and metric in record)
    return f"the best of {state.global_step} steps is {best}: {metric} {value:.6g}"


def check_measured(metric: str | None, terms: Collection[str]) -> None:
    """ValueError where no evaluation of a method with these terms will have `metric`."""
    known = ["eval_loss", *(f"eval_{name}" for name in terms)]
    if metric is not None and metric not in known:
        raise ValueError(f"keep_best is {metric}, which is not measured: an evaluation has {', '.join(known)}")


class MeasureAndKeep(TrainerCallback):
    """An evaluation after the last step too; where `metric` is given, a checkpoint wherever it is the best so far."""

    def __init__(self, metric: str | None):
        self.metric = metric

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self.metric is not None and best_step(state.log_history, self.metric) == state.global_step:
            control.should_save = True
