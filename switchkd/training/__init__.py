"""Training: one trainer for every method."""

from switchkd.lazy import lazily

__all__ = [
    "DistillTrainer",
    "Interrupted",
    "latest_checkpoint",
    "part_rates",
    "process_state",
    "training_arguments",
]

__getattr__ = lazily(
    __name__,
    {
        "DistillTrainer": "trainer",
        "Interrupted": "interrupt",
        "latest_checkpoint": "checkpoints",
        "part_rates": "rates",
        "process_state": "processes",
        "training_arguments": "arguments",
    },
)
