"""Training samples that are held out to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from switchkd.training.identity import data_identity
from switchkd.training.order import sample_lengths

HELD_OUT = 100


class Share(Dataset):
    """Some samples of a set, in its order. `name`: what tells them from others of the set."""

    def __init__(self, whole: Any, indices: Sequence[int], name: str):
        self.whole = whole
        self.indices = list(indices)
        self.name = name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.indices[index]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, where the set knows them."""
        whole = sample_lengths(self.whole)
        return [whole[index] for index in self.indices]

    def identity(self) -> dict[str, dict[str, Any]]:
        """The set's, and which share of it this is."""
        return {**data_identity(self.whole), "share": {"share of the samples": self.name}}


def hold_out(samples: Any, count: int | None, field: str) -> tuple[Share, Share]:
    """The samples to train on and those to evaluate on: `count` of `samples`, spread evenly over them; None: 100.

    Raises ValueError, naming `field`, where more than half would be held out.
    """
    count = HELD_OUT if count is None else count
    if 2 * count > len(samples):
        raise ValueError(
            f"{field} is {count} and there are {len(samples)} training samples: hold out half of them at most"
        )
    held = [place * len(samples) // count for place in range(count)]
    kept = sorted(set(range(len(samples))) - set(held))
    return Share(samples, kept, f"all but {count}"), Share(samples, held, f"{count} held out")
