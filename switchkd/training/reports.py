"""Where the records of a stage go besides its log: tensorboard, wandb, trackio."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback


def place_reports(callbacks: Collection[TrainerCallback], folder: Path, stage: str) -> None:
    """Let TensorBoard write to `folder/tensorboard/STAGE`, which outlives the checkpoints; TENSORBOARD_LOGGING_DIR,
    where it is set, stays."""
    for each in callbacks:
        if isinstance(each, TensorBoardCallback) and each.logging_dir is None:
            each.logging_dir = str(folder / "tensorboard" / stage)


def finish_reports(names: Collection[str]) -> None:
    """End what a stage reported to, so that the next stage is a run of its own there."""
    if "wandb" in names:
        import wandb

        wandb.finish()
