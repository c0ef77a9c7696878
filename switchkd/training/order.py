"""The order of samples where batches are grouped by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(Sampler[int]):
    """Indices in which neighbours have about one length, in steps of random order: transformers' megabatches, shuffled.

    lengths: tokens of each sample. together: samples of one optimizer step over all processes. The order follows
    `seed` and the epoch alone, so that every process and a resumed run see the same one.
    """

    def __init__(self, lengths: Sequence[int], together: int, seed: int):
        self.lengths = list(lengths)
        self.together = together
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        grouped = get_length_grouped_indices(self.lengths, self.together, generator=generator)
        steps = [grouped[start : start + self.together] for start in range(0, len(grouped), self.together)]
        # As they come, each megabatch runs from long to short. A last step that is not full stays the last.
        full = len(grouped) // self.together
        order = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(steps))]
        return (index for step in order for index in steps[step])


def sample_lengths(dataset: Dataset | Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of each sample: `dataset.lengths` where it has them, else of a list of encoded samples.

    Raises ValueError where neither is given: reading every picture of a large set for its length would take hours.
    """
    if hasattr(dataset, "lengths"):
        return list(dataset.lengths)
    if isinstance(dataset, list):
        return [len(sample["input_ids"]) for sample in dataset]
    raise ValueError(
        f"group_by_length is set but {type(dataset).__name__} has no `lengths`: give it the tokens of each sample, or "
        "leave group_by_length out"
    )
