"""Training: one trainer for every method."""

from switchkd.lazy import lazily

__all__ = [
    "DistillTrainer",
    "Interrupted",
    "latest_checkpoint",
    "process_state",
    "training_arguments",
]

__getattr__ = lazily(
    __name__,
    {
        "DistillTrainer": "trainer",
        "Interrupted": "interrupt",
        "latest_checkpoint": "checkpoints",
        "process_state": "processes",
        "training_arguments": "arguments",
    },
)
