"""What a set of samples holds, in figures."""

from __future__ import annotations

from typing import Any

import numpy as np

from switchkd.data.conversations.encoding import ConversationDataset


def summarise(dataset: ConversationDataset) -> dict[str, Any]:
    """The figures of a checked set, in plain numbers.

    conversations; text_only, one_image, several_images: how many of them have none, one or more images; turns: answers
    in all; length: {"min", "median", "p95", "max"} of the samples in ids, image tokens expanded and after the cut, 0
    for an empty set; answer_share: answer tokens of all ids, 0 to 1; cut: samples that max_length shortens.
    """
    images = np.array([len(each.images) for each in dataset.conversations], dtype=int)
    lengths = np.array(dataset.lengths or [0])
    answers = (message["role"] == "assistant" for each in dataset.conversations for message in each.messages)
    quantiles = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {
        "conversations": len(dataset),
        "text_only": int((images == 0).sum()),
        "one_image": int((images == 1).sum()),
        "several_images": int((images > 1).sum()),
        "turns": sum(answers),
        "length": {name: int(np.percentile(lengths, rank, method="nearest")) for name, rank in quantiles.items()},
        "answer_share": sum(dataset.answer_lengths) / max(int(lengths.sum()), 1),
        "cut": dataset.cut,
    }
