"""A run from its configuration to its table, whatever its task: every stage in order, then judging."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from switchkd.config import Stage, weight_fields
from switchkd.runs import RunFolder, Stopped
from switchkd.training.arguments import check_settings, training_arguments
from switchkd.training.held_out import hold_out
from switchkd.training.memory import keep_freed_memory
from switchkd.training.processes import process_state
from switchkd.training.reports import finish_reports
from switchkd.training.trainer import DistillTrainer
from switchkd.training.zero import launched_stage


def train_run(task: ModuleType, config: Any) -> Path:
    """Trains every stage of `config` that is not finished yet, judges, and returns the run's folder.

    task: the module of `switchkd.tasks` whose configuration this is. Its functions know the models and the data: load,
    build_student, build_method, samples, collate, export, judge, and rehearse for a run that is to be tiny; its PARTS
    are the parameter name prefixes of each part of its models. Raises ValueError and OSError, before any stage trains,
    for what cannot run.
    """
    started = time.perf_counter()
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    if config.tiny:
        config = task.rehearse(config)
    RunFolder.check(config)
    stages = config.stages()
    if len(stages) > 1 and launched_stage() == 3:
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(
            f"ZeRO-3 trains one stage in a process, and this run has {len(stages)} ({names}): take ZeRO-2 "
            "(recipes/accelerate/zero2.yaml), or make each stage a run"
        )
    for stage in stages:
        check_settings(stage.train, stage.field("train"))
    loaded = task.load(config)
    config = loaded.config
    run = RunFolder.resume(config) if config.resume else _start(config)
    state.print(f"run folder: {run.path}")
    try:
        for stage in config.stages():
            if not is_finished(run, stage):
                train_stage(task, loaded, stage, run)
        task.judge(loaded, run)
    except KeyboardInterrupt as stop:
        raise Stopped(f"stage {stage.name}, {stop}" if str(stop) else f"after stage {stage.name} began", run) from stop
    state.print(f"{(time.perf_counter() - started) / 60:.1f} minutes; everything is in {run.path}")
    return run.path


def train_stage(task: ModuleType, loaded: Any, stage: Stage, run: RunFolder) -> None:
    """Trains `stage` from its newest checkpoint, or from its start, to its stock checkpoint."""
    state = PartialState()
    student, processor = task.build_student(loaded, stage, run)
    method = task.build_method(loaded, stage, student, run)
    samples, held_out = task.samples(loaded, stage), None
    if stage.train.eval_every:
        samples, held_out = hold_out(samples, stage.train.eval_samples, f"{stage.field('train')}.eval_samples")
    settings = stage.train.settled(len(samples), state.num_processes)
    state.print(f"{stage.name}: {settings.steps} steps")
    title = f"{run.path.name} {stage.name}"
    trainer = DistillTrainer(
        method,
        training_arguments(settings, run.checkpoints(stage.name), seed=run.config.seed, run_name=title),
        train_dataset=samples,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=task.collate(loaded, stage),
        part_rates=settings.part_lr,
        parts=task.PARTS,
        group_by_length=settings.group_by_length,
        keep_best=settings.keep_best,
        run_config=weight_fields(run.config),
        log_file=run.path / "log.jsonl",
        log_fields={"stage": stage.name},
    )
    trainer.train(resume_from_checkpoint=True)
    finish_reports(settings.report_to)
    task.export(trainer, stage, run)
    if trainer.is_world_process_zero():
        shutil.rmtree(run.checkpoints(stage.name), ignore_errors=True)


def is_finished(run: RunFolder, stage: Stage) -> bool:
    """Whether `stage` of the run has its stock checkpoint; what a kill after that left to resume from goes."""
    finished = run.model(stage.folder).exists()
    if finished and PartialState().is_main_process:
        shutil.rmtree(run.checkpoints(stage.name), ignore_errors=True)
    return finished


def _start(config: Any) -> RunFolder:
    """The run's folder, made by the first process and known to all."""
    folder = [RunFolder.start(config) if PartialState().is_main_process else None]
    return broadcast_object_list(folder)[0]
