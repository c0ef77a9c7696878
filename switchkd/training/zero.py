"""What DeepSpeed's engine keeps of a run: its files hold no frozen teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import nn

from switchkd.training.checkpoints import drop_frozen


def launched_stage() -> int:
    """The ZeRO stage that accelerate was launched with; 0 for none."""
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and "ACCELERATE_DEEPSPEED_ZERO_STAGE" not in os.environ:
        return 0
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return int(json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))


def save_engine(engine: Any, method: nn.Module, folder: str | os.PathLike) -> None:
    """Write the state of DeepSpeed's `engine` around `method` into `folder`; all ranks call this."""
    # Trainer leaves frozen parameters out for PEFT models only; the option leaves the teachers' buffers in.
    hook = method.register_state_dict_post_hook(drop_frozen)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    hook.remove()


def load_engine(engine: Any, folder: str | os.PathLike) -> None:
    """Read what `save_engine` wrote; frozen parameters keep the values that the method was built with.

    Raises ValueError where there is nothing of DeepSpeed in `folder`.
    """
    path, _ = engine.load_checkpoint(folder, load_module_strict=False)
    if path is None:  # DeepSpeed only warns, and would train on from the start weights
        raise ValueError(f"{folder} holds no state of DeepSpeed: resume from another one")


def owns(scheduler: Any) -> bool:
    """Whether `scheduler` is DeepSpeed's own, which is then in its files."""
    from accelerate.utils import DeepSpeedSchedulerWrapper  # there only where deepspeed is installed

    return isinstance(scheduler, DeepSpeedSchedulerWrapper)
