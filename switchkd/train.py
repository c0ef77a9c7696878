"""Training a run: what the recipes and `switchkd train` share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from switchkd.runs import RunFolder, Stopped
from switchkd.tasks import task_of
from switchkd.tasks.vlm_config import Run


def train(config: Run, *, distils: bool | None = None) -> Path:
    """Runs every stage of `config` that is not finished yet, judges, and returns the run's folder.

    distils: whether a stage has to learn from a teacher, as a recipe says; None: either way. Raises ValueError and
    OSError, before anything is trained, for what cannot run.
    """
    if not config.tiny:  # a rehearsal has another name
        RunFolder.check(config)
    if distils and not config.distils:
        raise ValueError("distil is null, so that nothing is distilled: run recipes/train_vlm.py")
    if distils is False and config.distils:
        learning = next(stage.name for stage in config.stages() if stage.method)
        raise ValueError(
            f"stage {learning} learns from a teacher, and this recipe has none: set {learning} to null, or run "
            "recipes/distill_tinyllava.py"
        )
    from transformers.utils import logging

    from switchkd.training.stages import train_run

    logging.disable_progress_bar()
    return train_run(task_of(config), config)


def one_line(main: Callable[[], object], verb: str = "") -> int:
    """The exit status of a recipe, or of `verb` of the command line: what the user can mend ends as one line on stderr
    and status 2, an interruption as the command that goes on and status 130; other errors keep their traceback.

    That is this process's: accelerate launch adds a traceback of its own for a status that is not 0.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        _say(verb, f"error: {' '.join(str(error).split())}")
        return 2
    except Stopped as stop:
        _say(verb, f"stopped: {stop}; go on with: {shlex.join([*_command(verb), *stop.resume])}")
        return 130
    except KeyboardInterrupt:
        _say(verb, "stopped before training began")
        return 130
    finally:
        _leave_group()
    return 0


def _command(verb: str) -> list[str]:
    """What started this process, without its arguments: another number of processes could not resume its run."""
    several = ["--num_processes", os.environ["WORLD_SIZE"]] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        several = ["--config_file", "recipes/accelerate/zero2.yaml", *several]
    if verb:
        return ["accelerate", "launch", *several, "-m", "switchkd", verb] if several else ["switchkd", verb]
    launched = several or "ACCELERATE_MIXED_PRECISION" in os.environ
    return [*(["accelerate", "launch", *several] if launched else ["python"]), sys.argv[0]]


def _say(verb: str, line: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    who = f"switchkd {verb}" if verb else Path(sys.argv[0]).name
    print(f"{who}: {f'process {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)


def _leave_group() -> None:
    """Threads of gloo that outlive the interpreter can abort it."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
