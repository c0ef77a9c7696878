"""What a method has to offer to be trained by `DistillTrainer`."""

from __future__ import annotations

import inspect

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from switchkd.methods.terms import Terms


def check_method(method: nn.Module) -> None:
    """Raise ValueError where `method` lacks what the trainer needs, naming it and the way out.

    A method is a module with `student` (what it trains and exports), `frozen` (names of its children that are frozen
    teachers, () for none), `count(batch)` (items of a batch: answer tokens, boxes, pictures), `progress(fraction)` and
    a forward that takes `num_items_in_batch` and returns `Terms`. Its frozen children have no trainable parameter and
    stay in eval mode after `train()`.
    """
    name = type(method).__name__
    if not isinstance(getattr(method, "student", None), nn.Module):
        raise ValueError(f"{name} has no student: set self.student to the model that is trained")
    if not callable(getattr(method.student, "save_pretrained", None)):
        raise ValueError(
            f"{name}.student is a {type(method.student).__name__} without save_pretrained, so that it could not be "
            "exported when it is trained: make it a transformers PreTrainedModel"
        )
    if "num_items_in_batch" not in inspect.signature(method.forward).parameters:
        raise ValueError(
            f"{name}.forward takes no num_items_in_batch: take it and divide the sums by it, the count of the whole "
            "optimizer step"
        )
    for wanted, meaning in (("count", "the items of a batch"), ("progress", "told the run's fraction done")):
        if not callable(getattr(method, wanted, None)):
            raise ValueError(f"{name} has no {wanted}: define it, {meaning}")
    frozen = getattr(method, "frozen", None)
    if frozen is None or isinstance(frozen, str):
        raise ValueError(
            f"{name}.frozen is {frozen!r}: name its children that are frozen teachers, such as ('teacher',), or () for "
            "none; all others are trained and kept in checkpoints"
        )
    _check_frozen(method, name)


def _check_frozen(method: nn.Module, name: str) -> None:
    children = dict(method.named_children())
    mode = method.training
    method.train()
    try:
        for child in method.frozen:
            if child not in children or child == "student":
                others = [other for other in children if other != "student"]
                raise ValueError(f"{name}.frozen names {child!r}: its children beside the student are {others}")
            trained = [path for path, p in children[child].named_parameters() if p.requires_grad]
            if trained:
                raise ValueError(
                    f"{name}.frozen names {child!r}, of which {len(trained)} parameters would be trained "
                    f"({trained[0]}, ...): call requires_grad_(False) on it"
                )
            # A layer whose activations are recomputed says training itself; what is inside it does not.
            awake = [
                path or child
                for path, module in children[child].named_modules()
                if module.training and not isinstance(module, GradientCheckpointingLayer)
            ]
            if awake:
                raise ValueError(
                    f"{name}.train() puts {child!r} in training mode ({awake[0]}, ...): override train() so that its "
                    "frozen children stay in eval mode"
                )
    finally:
        method.train(mode)


def check_terms(terms: Terms, method: nn.Module) -> None:
    """Raise ValueError where what `method` returned is not the sum of its weighted terms."""
    name = type(method).__name__
    if not isinstance(terms, Terms) or not terms.named or not terms.weighted:
        raise ValueError(
            f"{name} returned {type(terms).__name__} without named or weighted terms: return Terms.of(...)"
        )
    if terms.named.keys() != terms.weighted.keys():
        raise ValueError(
            f"{name} returned terms named {list(terms.named)} and weighted {list(terms.weighted)}: return Terms.of(...)"
        )
    total = float(sum(term.detach() for term in terms.weighted.values()))
    loss = float(terms.loss.detach())
    if abs(loss - total) > 1e-3 * max(abs(loss), abs(total)):
        raise ValueError(
            f"{name} returned the loss {loss:.6g} and weighted terms that sum to {total:.6g}: return Terms.of(...)"
        )
