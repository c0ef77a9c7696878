"""What a run shows and writes while it trains: its terms, the progress bar and `log.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


class TermSums:
    """Terms of micro-batches added up between two logs."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._steps: set[int] = set()

    @property
    def empty(self) -> bool:
        """Whether nothing was added yet."""
        return not self._steps

    def add(self, named: Mapping[str, Tensor], step: int) -> None:
        """Add one micro-batch of optimizer step `step`."""
        self._steps.add(step)
        for name, value in named.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Each term summed over the ranks, mean over the steps that were added; all ranks call this."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        means = accelerator.reduce(sums, reduction="sum") / len(self._steps)
        return dict(zip(names, means.tolist(), strict=True))


class TermsBar(ProgressCallback):
    """Progress bar with the stage's name, rate, time left and the latest loss terms; it starts at a resumed run's
    step."""

    def __init__(self, stage: str = ""):
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                desc=self.stage or None,
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"{self.stage} evaluation".strip(), refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {name: value for name, value in logs.items() if name not in ("epoch", "grad_norm")}
        shown = {name.replace("learning_rate", "lr"): f"{value:.4g}" for name, value in shown.items()}
        self.training_bar.set_postfix(shown)


class StepLog(TrainerCallback):
    """Appends what the trainer logs to a file, one JSON object a line with its "step"; rank 0 only.

    fields: written into each record, such as {"stage": "teacher"}; runs with other fields can share the file.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path = path
        self.fields = dict(fields)

    def start(self, step: int) -> None:
        """Keep this run's records up to `step` and all of other runs; drop a line torn by a kill."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(self.path.name + ".incomplete")
        staged.write_text("".join(line for line in lines if line.endswith("\n") and self._stays(line, step)))
        os.replace(staged, self.path)

    def _stays(self, line: str, step: int) -> bool:
        record = json.loads(line)
        ours = all(record.get(name) == value for name, value in self.fields.items())
        return not ours or 0 < record["step"] <= step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({**self.fields, "step": state.global_step, **logs}) + "\n")
