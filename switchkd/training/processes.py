"""The processes of a run: one, or several that a launcher started together."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether this process computes on the CPU: torch sees no accelerator, or ACCELERATE_USE_CPU says so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process among those launched with it; call it before anything else asks for a `PartialState`.

    Without an accelerator a bare `PartialState()` takes each launched process for the only one: here they
    are joined over gloo, under DDP and under DeepSpeed.
    """
    if not on_cpu():
        return PartialState()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed, where it is installed, warns that it looked in vain
    if "LOCAL_RANK" not in os.environ:
        return PartialState(cpu=True)
    # accelerate does not look for DeepSpeed where it is told to use the CPU.
    return PartialState(cpu=not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"), backend="gloo")
