"""What a method has to offer to be trained by `DistillTrainer`."""

from __future__ import annotations

from torch import nn


def check_method(method: nn.Module) -> None:
    """Raise ValueError where `method` lacks what the trainer needs, naming it and the way out."""
    name = type(method).__name__
    if getattr(method, "accepts_loss_kwargs", None) is not True:
        raise ValueError(
            f"{name}.accepts_loss_kwargs is not True: the loss would not be divided by the answer tokens of "
            "the whole step; set it, and take num_items_in_batch in forward"
        )
    if not isinstance(getattr(method, "student", None), nn.Module):
        raise ValueError(f"{name} has no student: set self.student to the model that is trained")
