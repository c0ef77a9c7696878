"""Switch-KD from data to table: teacher, undistilled student and Switch-KD student, judged on the same questions.

    accelerate launch recipes/distill_tinyllava.py                                     the quickstart, offline, on a CPU
    accelerate launch recipes/distill_tinyllava.py --config recipes/configs/neu_det.yaml --data.root DIR
    accelerate launch recipes/distill_tinyllava.py --config recipes/configs/tinyllava_3b_to_0.5b.yaml --tiny
    accelerate launch recipes/distill_tinyllava.py --name quickstart --resume           go on after an interruption
    accelerate launch recipes/distill_tinyllava.py --help                               every field

Stages run one after the other, each from the student that the one before it made; a finished one is not repeated. The
undistilled student is the last stage without the teacher: the same start, samples, order, steps and learning rate. The
blind row is the Switch-KD student with every picture replaced by an even grey one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from switchkd import SupervisedMethod
from switchkd.evaluation.judge import Row, judge
from switchkd.models import freeze, load_llava, same_inputs, shared_vocab
from switchkd.models.pair import as_teacher_reads, teacher_processor
from switchkd.models.tiny import TEACHER
from switchkd.rehearsal import rehearse
from switchkd.runs import RunFolder
from switchkd.tasks import load_config
from switchkd.tasks.vlm_config import Run
from switchkd.training import process_state
from switchkd.training.memory import keep_freed_memory
from switchkd.training.stages import (
    StageData,
    build_method,
    is_finished,
    stages_of,
    start_run,
    start_student,
    train_method,
    train_stage,
)

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: list[str] | None = None) -> Path:
    """Runs every stage that is not finished yet, judges, and returns the run's folder."""
    started = time.perf_counter()
    config = read_config(list(sys.argv[1:] if argv is None else argv))
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    if config.tiny:
        config = rehearse(config)
    # What cannot run, a pair that cannot be switched or samples that cannot be read, ends here, before any training.
    teacher, teachers_processor = load_teacher(config, config.teacher.path or TEACHER)
    config = replace(config, student=as_teacher_reads(config.student, config.teacher, teachers_processor))
    run = RunFolder.resume(config) if config.resume else None
    stages = stages_of(config)
    if stages[-1].config.method is None:
        raise ValueError("every term of method is null, nothing is distilled: run recipes/train_vlm.py")
    student, processor = start_student(config, stages[-1])
    shared = shared_vocab(processor.tokenizer, teachers_processor.tokenizer)
    same_inputs(processor, teachers_processor)
    for stage in stages:
        freeze(student, stage.config.freeze)
        build_method(stage.config, student, teacher, shared)
    data = StageData(config, stages, processor)
    questions = data.questions(config.data)
    state.print(f"{len(questions):,} test questions")
    run = run or start_run(config)
    state.print(f"run folder: {run.path}")

    teacher_path = config.teacher.path or TEACHER
    if config.teacher.steps:
        teacher_path = run.model("teacher")
        if not is_finished(run, "teacher"):
            freeze(teacher)
            rates = {"lr": config.teacher.lr, "encoder_lr": None, "projector_lr": None}
            settings = replace(config.train, steps=config.teacher.steps, **rates)
            samples = data.samples(config.data)
            train_method(run, "teacher", SupervisedMethod(teacher), settings, samples, teachers_processor)
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    teacher, teachers_processor = load_teacher(config, teacher_path, dtype)
    for stage in stages:
        if not is_finished(run, stage.name):
            train_stage(run, stage, data.samples(stage.config.data), teacher, shared)

    if questions:
        rows = [Row("teacher", teacher, teachers_processor)]
        if config.undistilled:
            rows.append(Row("undistilled", *load_llava(run.model("undistilled"))))
        student = load_llava(run.model("student"))
        judge(run, [*rows, Row("Switch-KD", *student), Row("Switch-KD, blind", *student, blank=True)], questions)
    else:
        state.print("data.test_split is null: nothing is judged")
    state.print(f"{(time.perf_counter() - started) / 60:.1f} minutes; everything is in {run.path}")
    return run.path


def read_config(argv: list[str]) -> Run:
    """The configuration; without --config that of the run to resume, or else the quickstart's."""
    if any(argument.partition("=")[0] == "--config" for argument in argv):
        return load_config(argv)
    config = load_config(["--config", str(QUICKSTART), *argv])
    own = config.folder / "config.yaml"
    return load_config(["--config", str(own), *argv]) if config.resume and own.is_file() else config


def load_teacher(config: Run, path, dtype: torch.dtype = torch.float32) -> tuple:
    """The teacher and its processor, with the chat template that the configuration names for it."""
    if config.teacher.made_by and not Path(path).exists():
        raise FileNotFoundError(
            f"teacher.path is {path}, which does not exist: make it with accelerate launch recipes/train_vlm.py "
            f"--config {config.teacher.made_by}, or name another teacher"
        )
    return load_llava(path, dtype)[0], teacher_processor(replace(config.teacher, path=str(path)))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # threads of gloo that outlive the interpreter can abort it
