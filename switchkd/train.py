"""Training a run: what the recipes and `switchkd train` share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from switchkd.tasks import task_of
from switchkd.tasks.vlm_config import Run


def train(config: Run) -> Path:
    """Runs every stage of `config` that is not finished yet, judges, and returns the run's folder.

    Raises ValueError and OSError, before anything is trained, for what cannot run.
    """
    from transformers.utils import logging

    from switchkd.training.stages import train_run

    logging.disable_progress_bar()
    return train_run(task_of(config), config)


def one_line(main: Callable[[], object]) -> int:
    """The exit status of a recipe: what the user can mend ends as one line on stderr and status 2, an interruption as
    the command that goes on and status 130; any other error keeps its traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt as stop:
        _say(f"stopped: {stop}; go on with: {resuming()}" if str(stop) else "stopped before a step was trained")
        return 130
    finally:
        _leave_group()
    return 0


def resuming() -> str:
    """The command of this process again, with --resume."""
    words = [word for word in sys.argv[1:] if word not in ("--resume",)]
    launch = "accelerate launch" if Path(sys.argv[0]).suffix == ".py" else ""
    return shlex.join([*launch.split(), sys.argv[0], *words, "--resume"])


def _say(line: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    print(f"{Path(sys.argv[0]).name}: {f'process {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)


def _leave_group() -> None:
    """Threads of gloo that outlive the interpreter can abort it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
