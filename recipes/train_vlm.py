"""A LLaVA-style model from a vision tower and a language model: pretrain, then supervised fine-tuning.

    accelerate launch recipes/train_vlm.py --config recipes/configs/tinyllava_3b.yaml
    accelerate launch recipes/train_vlm.py --config recipes/configs/tinyllava_3b.yaml --tiny

The teacher of recipes/distill_tinyllava.py, where none is at hand. The same configuration without its teacher: both
divergences of `method` are null, `student` is the model that is made, and it ends in runs/NAME/student.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from switchkd.evaluation.judge import Row, judge
from switchkd.models import load_llava
from switchkd.rehearsal import rehearse
from switchkd.runs import RunFolder
from switchkd.tasks import load_config
from switchkd.training import process_state
from switchkd.training.memory import keep_freed_memory
from switchkd.training.stages import StageData, is_finished, stages_of, start_run, start_student, train_stage


def main(argv: list[str] | None = None) -> Path:
    """Runs every stage that is not finished yet, judges, and returns the run's folder."""
    started = time.perf_counter()
    config = load_config(argv)
    stages = stages_of(config)
    if distilled := [stage.name for stage in stages if stage.config.method]:
        raise ValueError(
            f"stage {distilled[0]} has a method, and this recipe has no teacher: set method.align and method.switch to "
            "null, or run recipes/distill_tinyllava.py"
        )
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    if config.tiny:
        config = rehearse(config)
        stages = stages_of(config)
    run = RunFolder.resume(config) if config.resume else None

    _, processor = start_student(config, stages[-1])
    data = StageData(config, stages, processor)
    questions = data.questions(config.data)
    run = run or start_run(config)
    state.print(f"run folder: {run.path}")
    for stage in stages:
        if not is_finished(run, stage.name):
            train_stage(run, stage, data.samples(stage.config.data))

    if questions:
        made = load_llava(run.model("student"))
        judge(run, [Row(config.name, *made), Row(f"{config.name}, blind", *made, blank=True)], questions)
    else:
        state.print("data.test_split is null: nothing is judged")
    state.print(f"{(time.perf_counter() - started) / 60:.1f} minutes; everything is in {run.path}")
    return run.path


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # threads of gloo that outlive the interpreter can abort it
