"""Training: one trainer for every method."""

from switchkd.training.arguments import part_rates, training_arguments
from switchkd.training.checkpoints import latest_checkpoint
from switchkd.training.processes import process_state
from switchkd.training.trainer import DistillTrainer

__all__ = ["DistillTrainer", "latest_checkpoint", "part_rates", "process_state", "training_arguments"]
