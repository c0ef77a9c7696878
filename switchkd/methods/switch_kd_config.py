"""How the student learns from the teacher: the `method` section of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from switchkd.config import at_least, refuse_unread
from switchkd.losses.named import check_divergence


@dataclass(frozen=True)
class SwitchKDConfig:
    """How the student learns from the teacher; see `switchkd.SwitchKD`."""

    align: str | None = "dbild"
    """Divergence of the student's logits from the teacher's: dbild, bild, forward_kl, reverse_kl, jsd, or your own
    function [N, V], [N, V] -> [N] as package.module:function; null: none."""
    switch: str | None = "dbild"
    """Divergence of the switched logits (the student's features read by the teacher) from the teacher's;
    null: none. With align, switch and feature null nothing is distilled: cross entropy alone."""
    feature: Literal["cosine", "relation"] | None = None
    """Distance of the vision tower's features from the teacher's: cosine (of each visual token) or relation (of the
    matrix of likenesses between visual tokens); null: none."""
    align_weight: float = 1.0
    """Weight of the align term (lambda 1 of Eq. 1)."""
    switch_weight: float = 1.0
    """Weight of the switch term (lambda 2 of Eq. 1)."""
    feature_weight: float = 1.0
    """Weight of the feature term."""
    align_options: dict[str, Any] = field(default_factory=dict)
    """Options of the align divergence, such as {temperature: 3.0}."""
    switch_options: dict[str, Any] = field(default_factory=dict)
    """Options of the switch divergence."""
    switch_adapter: Literal["linear"] | None = None
    """Where the student's vision tower has another width or another number of visual tokens than the teacher's: linear
    fits a map onto the teacher's features, by least squares on 256 samples, and trains it along; null: none."""
    gradient_checkpointing: bool = False
    """Recompute the teacher's activations of the switch pass in backward: less memory, more time."""

    def __post_init__(self):
        for name in ("align", "switch"):
            if (choice := getattr(self, name)) is not None:
                try:
                    check_divergence(choice)
                except ValueError as error:
                    raise ValueError(f"method.{name}: {error}") from error
        at_least("method", self, align_weight=0, switch_weight=0, feature_weight=0)
        of_terms = {
            "align": ("align_weight", "align_options"),
            "switch": ("switch_weight", "switch_options"),
            "feature": ("feature_weight",),
        }
        for term, names in of_terms.items():
            if getattr(self, term) is None:
                refuse_unread("method", self, names, f"method.{term} is null, and nothing else reads it: set {term}")
        if self.switch_adapter and not self.switch and not self.feature:
            raise ValueError(
                f"method.switch_adapter is {self.switch_adapter} but method.switch and method.feature are null, and no "
                "other term reads it: set one of them, or drop the adapter"
            )

    @property
    def distils(self) -> bool:
        """Whether any term compares the student with the teacher."""
        return any((self.align, self.switch, self.feature))
