"""Ctrl-C and SIGTERM: training ends after the step in hand, with a checkpoint of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher hands the terminal's Ctrl-C on to processes that the terminal told already.
SAME_PRESS = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """Training ended at a signal after optimizer step `step`; `checkpoint` is the folder where it goes on."""

    def __init__(self, step: int, checkpoint: Path):
        super().__init__(f"after step {step}, which {checkpoint} keeps")
        self.step = step
        self.checkpoint = checkpoint


class StopAtSignal(TrainerCallback):
    """While it is entered, the first SIGINT or SIGTERM that any rank gets makes all ranks save a checkpoint after the
    step in hand (after the evaluation that follows it, where one does) and raise `Interrupted`.

    A second one, a second or more after the first, does what it did before. A signal that this process ignores stays
    ignored. (Trainer's own enable_jit_checkpoint knows SIGTERM alone, and each rank stops where it happens to be.)
    """

    def __init__(self):
        self._former: dict[int, Any] = {}
        self._group = None
        self._process = None
        self._caught: float | None = None
        self._stopping = False

    def __enter__(self) -> StopAtSignal:
        self._caught, self._stopping, self._process = None, False, os.getpid()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The ranks agree on the CPU: on the accelerator each step would wait for the one before it.
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            former = {number: signal.getsignal(number) for number in SIGNALS}
            # None: set outside Python, where it could not be put back.
            self._former = {n: known for n, known in former.items() if known not in (None, signal.SIG_IGN)}
            for number in self._former:
                signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()
        self._process = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _catch(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a process that reads data: the one that trains decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self._caught is None:
            self._caught = now
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                text = f"\n{name}: a checkpoint follows after this step; once more ends at once, without one\n"
                os.write(2, text.encode())  # a handler may not wait for a lock that print has
        elif now - self._caught > SAME_PRESS:
            self._restore()
            signal.raise_signal(number)

    def _asked(self) -> bool:
        asked = self._caught is not None
        if self._group is not None:
            flag = torch.tensor(int(asked))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            asked = bool(flag)
        return asked

    def on_step_end(self, args, state, control, **kwargs):
        if self._asked():
            self._stopping = control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self._process and not self._stopping and self._asked():
            self._stopping = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            raise Interrupted(state.global_step, Path(args.output_dir) / f"checkpoint-{state.global_step}")
