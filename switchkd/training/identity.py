"""What tells two runs apart: their settings and their samples, kept in a checkpoint and compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchkd.digest import digest
from switchkd.training.checkpoints import RUN


def refuse_other_run(checkpoint: Path, current: Mapping[str, Any]) -> None:
    """Raise ValueError when `checkpoint` was written by a run with other values than `current`.

    `current`: groups of values as `run.json` holds them, {"config": {...}, "arguments": {...}, ...}. The
    first group that differs is reported with its keys and both values; one that only one of them has is not
    compared.
    """
    saved, current = json.loads((checkpoint / RUN).read_text()), as_json(current)
    for group in [group for group in current if group in saved]:
        before, now = _flat(saved[group]), _flat(current[group])
        different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if different:
            values = [f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in different]
            raise ValueError(
                f"{checkpoint} was written by another run: {'; '.join(values)}. Resume with the saved value, "
                "or start a new run under another name"
            )


def data_identity(dataset: Any) -> dict[str, dict[str, Any]]:
    """What tells the samples of two runs apart, in the groups that `refuse_other_run` compares.

    What `dataset.identity()` says, where it has that method; else the number of samples, and of a list of encoded
    ones hashes of their `sample_id` and `input_ids`, where they have them.
    """
    if hasattr(dataset, "identity"):
        return dataset.identity()
    identity: dict[str, dict[str, Any]] = {"data": {"samples": len(dataset)}}
    if isinstance(dataset, list) and all("sample_id" in sample for sample in dataset):
        identity["data"]["hash of the sample ids"] = digest(str(sample["sample_id"]).encode() for sample in dataset)
    if isinstance(dataset, list) and all("input_ids" in sample for sample in dataset):
        tokens = (sample["input_ids"].numpy().tobytes() for sample in dataset)
        identity["tokens"] = {"hash of the token ids": digest(tokens)}
    return identity


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def as_json(value: Any) -> Any:
    """`value` as it reads back from a JSON file: tuples become lists, paths and enums their text."""
    return json.loads(json.dumps(value, default=str))
