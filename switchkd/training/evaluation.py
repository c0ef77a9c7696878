"""A method's terms over a whole set: summed over all its samples and divided by the count of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments


class RankBatches(Sampler[list[int]]):
    """The batches of one rank: every `ranks`-th of all, in the order of the samples, none filled up.

    Every rank has equally many, as ZeRO-3 needs of forward passes: where they run out, a rank reads the first batch
    again. `own`: how many come before that.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, ranks: int):
        batches = [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]
        mine = batches[rank::ranks]
        self.own = len(mine)
        self.batches = mine + batches[:1] * (-(-len(batches) // ranks) - len(mine))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def evaluation_loader(dataset: Dataset, collate: Callable, args: TrainingArguments) -> DataLoader:
    """This rank's batches of `dataset`, which has a length."""
    return DataLoader(
        dataset,
        batch_sampler=RankBatches(len(dataset), args.per_device_eval_batch_size, args.process_index, args.world_size),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )


def mean_terms(
    model: nn.Module,
    loader: DataLoader,
    count: Callable[[Mapping[str, Tensor]], Tensor | float],
    prepare: Callable[[Any], Any],
    accelerator: Accelerator,
    each: Callable[[], None],
) -> dict[str, float]:
    """ "loss" and each named term of `model`, summed over the samples of all ranks and divided by the items of all.

    loader: of `evaluation_loader`. count: the method's. prepare: brings a batch to the model's device. each: called
    after each batch. Raises ValueError where there is no item in the whole set.
    """
    sums: dict[str, float] = {}
    items = 0.0
    for place, batch in enumerate(loader):
        batch = prepare(batch)
        with torch.no_grad():
            terms = model(**batch, num_items_in_batch=1)
        found = {**terms.named, "loss": terms.loss.detach()}
        values = torch.stack(list(found.values())).tolist()
        counts = place < loader.batch_sampler.own
        for name, value in zip(found, values, strict=True):
            sums[name] = sums.get(name, 0.0) + value * counts
        items += float(count(batch)) * counts
        each()
    names = sorted(sums)
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    mine = torch.tensor([items, *(sums[name] for name in names)], dtype=kind, device=accelerator.device)
    items, *whole = accelerator.reduce(mine, reduction="sum").tolist()
    if not items:
        raise ValueError("the method's count finds no item in the evaluation set: nothing can be measured on it")
    return {name: value / items for name, value in zip(names, whole, strict=True)}
