"""What a run shows and writes while it trains: the progress bar and `log.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


class TermsBar(ProgressCallback):
    """Progress bar with rate, time left and the latest loss terms. After a resume it starts at the resumed
    step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {name: value for name, value in logs.items() if name not in ("epoch", "grad_norm")}
        shown = {name.replace("learning_rate", "lr"): f"{value:.4g}" for name, value in shown.items()}
        self.training_bar.set_postfix(shown)


class StepLog(TrainerCallback):
    """Appends what the trainer logs to a file, one JSON object a line with its "step"; rank 0 only."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, step: int) -> None:
        """Keep the records up to `step` (0: none), drop later ones and a line torn by a kill."""
        lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(self.path.name + ".incomplete")
        staged.write_text("".join(kept))
        os.replace(staged, self.path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
