"""The export of a student: a stock checkpoint of it alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from switchkd.training import checkpoints


def export_student(method: nn.Module, processing_class: Any, folder: Path, step: int, write: bool) -> None:
    """Write `method.student` after `step`, and `processing_class` where there is one, with `save_pretrained`.

    `folder` is replaced when the new one is whole. A collective under ZeRO-3, where only ranks with `write` write.
    Raises ValueError when a weight is not finite and OSError when the disk refuses; `folder` is then as it was.
    """
    staged = folder.with_name(f".{folder.name}{checkpoints.STAGING}")
    state = checkpoints.method_state(method)
    state = {name.removeprefix("student."): t for name, t in state.items() if name.startswith("student.")}
    state = checkpoints.gather(state, step, keep=write)
    if not write:
        return
    shutil.rmtree(staged, ignore_errors=True)
    try:
        method.student.save_pretrained(staged, state_dict=state)
        if processing_class is not None:
            processing_class.save_pretrained(staged)
        checkpoints.put_in_place(staged, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = folder if folder.exists() else None
        failure = checkpoints.disk_error(error, "the student", folder.parent, kept)
        shutil.rmtree(staged, ignore_errors=True)
        raise failure from error
