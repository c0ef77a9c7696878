"""Where a run goes on: the same checkpoint on every rank, and a whole one."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate.utils import broadcast_object_list

from switchkd.training.checkpoints import flaw, latest_checkpoint


def chosen_checkpoint(folder: Path, asked: str | os.PathLike | bool | None, first: bool) -> Path | None:
    """The checkpoint of `folder` to go on from; None: a fresh start. All ranks call this, the `first` one reads.

    asked: a checkpoint's own folder; True: the newest whole one, or a fresh start where there is none. Raises
    ValueError on every rank where that checkpoint is torn and where a fresh start would mix with an earlier run's.
    """
    found = latest_checkpoint(folder) if first else None
    found = broadcast_object_list([found])[0]  # ranks that looked for themselves could disagree
    if not asked and found:
        raise ValueError(
            f"{folder} holds {found.name} of an earlier run: resume it (resume_from_checkpoint=True), remove it, or "
            "give this run another folder"
        )
    if asked is True or not asked:
        return found
    if Path(asked) != found:  # which was read to find it
        refuse_torn(Path(asked), first)
    return Path(asked)


def refuse_torn(checkpoint: Path, first: bool) -> None:
    """ValueError on every rank where the `first` one finds that `checkpoint` is not whole."""
    reason = broadcast_object_list([flaw(checkpoint) if first else None])[0]
    if reason:
        raise ValueError(f"{checkpoint} is not a whole checkpoint: {reason}; resume from another one")


def refuse_without_optimizer(checkpoint: Path) -> None:
    """ValueError where `checkpoint` lacks what Trainer would silently begin anew."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} has no {name}: resume from another one")
