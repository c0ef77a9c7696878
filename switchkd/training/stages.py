"""The stages of a run: what each trains, from what, and how it is trained to its stock checkpoint."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, set_seed

from switchkd.config import TrainConfig, weight_fields
from switchkd.data import Conversation, ConversationDataset
from switchkd.data.config import DataConfig
from switchkd.data.sources import Source, load_source
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.models import freeze, load_llava
from switchkd.models.adapter import LinearAdapter, fit_switch_adapter
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora, merge_lora
from switchkd.models.students import build_student
from switchkd.runs import RunFolder
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.arguments import part_rates, training_arguments
from switchkd.training.trainer import DistillTrainer

NAMES = {"pretrain.": "pretrain", "sft.": "sft", "": "student"}


@dataclass(frozen=True)
class Stage:
    """One stage of a run. `name`: of its folder in the run's. `start`: the stage whose student it starts from; None:
    the student that the configuration builds."""

    name: str
    start: str | None
    config: StageConfig


def stages_of(config: Run) -> list[Stage]:
    """The stages in order; before a last one that distils, the undistilled student, where the run asks for it."""
    stages, start = [], None
    for prefix, stage in config.stages().items():
        if prefix == "" and stage.method and config.undistilled:
            stages.append(Stage("undistilled", start, replace(stage, method=None)))
        stages.append(Stage(NAMES[prefix], start, stage))
        start = NAMES[prefix]
    return stages


class StageData:
    """The conversations of every stage, read and checked before any of them trains.

    Stages of one data section share one set. The first process checks, the others read what it found.
    """

    def __init__(self, config: Run, stages: list[Stage], processor: LlavaProcessor):
        self.processor = processor
        self._sets: dict[DataConfig, ConversationDataset] = {}
        self._sources: dict[DataConfig, Source] = {}
        self._encoded: dict[DataConfig, list[dict[str, Any]]] = {}
        state = PartialState()
        for stage in stages:
            data = stage.config.data
            if data not in self._sets:
                self._sources[data] = source = load_source(data)
                with state.main_process_first():
                    self._sets[data] = ConversationDataset(
                        source.train,
                        processor,
                        data.max_length,
                        data.max_bad_rate,
                        cache=config.checks,
                        workers=min(16, os.cpu_count() or 1),
                    )
                state.print(f"{stage.name}: {len(self._sets[data]):,} training samples")
            stage.config.train.settled(len(self._sets[data]), state.num_processes)

    def questions(self, data: DataConfig) -> list[Conversation]:
        """The test questions of `data`, checked; [] where it names no test part."""
        test = self._sources[data].test
        if not test:
            return []
        return ConversationDataset(test, self.processor, max_bad_rate=data.max_bad_rate).conversations

    def samples(self, data: DataConfig) -> ConversationDataset | list[dict[str, Any]]:
        """The training samples of `data`, encoded once where it says so."""
        samples = self._sets[data]
        if not data.in_memory:
            return samples
        if data not in self._encoded:
            hidden = not PartialState().is_local_main_process
            order = tqdm(range(len(samples)), desc="encoding", unit="sample", disable=hidden)
            self._encoded[data] = [samples[index] for index in order]
        return self._encoded[data]


def start_run(config: Run) -> RunFolder:
    """The run's folder, made by the first process and known to all."""
    folder = [RunFolder.start(config) if PartialState().is_main_process else None]
    return broadcast_object_list(folder)[0]


def is_finished(run: RunFolder, name: str) -> bool:
    """Whether stage `name` of the run has its stock checkpoint; what a kill after that left to resume from goes."""
    finished = run.model(name).exists()
    if finished and PartialState().is_main_process:
        shutil.rmtree(run.checkpoints(name), ignore_errors=True)
    return finished


def start_student(config: Run, stage: Stage, run: RunFolder | None = None) -> tuple:
    """Student and processor as `stage` starts with them, its frozen parts frozen; random parts follow the seed.

    Without a run, the student that the configuration builds, whatever the stage.
    """
    set_seed(config.seed)
    if run is None or stage.start is None:
        student, processor = build_student(config.student)
    else:
        student, processor = load_llava(run.model(stage.start))
    freeze(student, stage.config.freeze)
    return student, processor


def build_method(
    stage: StageConfig,
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration | None,
    shared_vocab: int | None,
    switch_adapter: LinearAdapter | None = None,
) -> nn.Module:
    """What the stage trains: Switch-KD where it has a method, cross entropy alone elsewhere.

    switch_adapter: the fitted one, where the method has one; without it, as a check of the pair needs, one at its
    random start.
    """
    if stage.method is None:
        return SupervisedMethod(student)
    options = asdict(stage.method)
    if options.pop("switch_adapter") and switch_adapter is None:
        switch_adapter = LinearAdapter.between(student, teacher)
    return SwitchKD(student, teacher, shared_vocab=shared_vocab, switch_adapter=switch_adapter, **options)


def fit_adapter(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, samples: Any, count: int = 256
) -> LinearAdapter:
    """The switch adapter of the pair, fitted on the pictures of up to `count` samples spread evenly over all."""
    state = PartialState()
    for model in (student, teacher):
        model.model.vision_tower.to(state.device)
    spread = (samples[index] for index in range(0, len(samples), math.ceil(len(samples) / count)))
    adapter = fit_switch_adapter(student, teacher, (s["pixel_values"] for s in spread if "pixel_values" in s))
    state.print(f"switch adapter: explains {adapter.r2:.1%} of the variance of the teacher's vision features (R2)")
    return adapter


def train_stage(
    run: RunFolder,
    stage: Stage,
    samples: Any,
    teacher: LlavaForConditionalGeneration | None = None,
    shared_vocab: int | None = None,
) -> None:
    """Trains `stage` from its newest checkpoint, or from its start, and exports its student."""
    student, processor = start_student(run.config, stage, run)
    adapter = None
    if stage.config.method and stage.config.method.switch_adapter:
        adapter = fit_adapter(student, teacher, samples)
    method = build_method(stage.config, student, teacher, shared_vocab, adapter)
    train_method(run, stage.name, method, stage.config.train, samples, processor)


def train_method(
    run: RunFolder, name: str, method: nn.Module, settings: TrainConfig, samples: Any, processor: LlavaProcessor
) -> None:
    """Trains `method` as stage `name` of the run, through LoRA where `settings` say so: checkpoints while it trains, a
    stock checkpoint at its end."""
    state = PartialState()
    settings = settings.settled(len(samples), state.num_processes)
    state.print(f"training: {name}, {settings.steps} steps")
    if settings.lora_rank:
        set_seed(run.config.seed)  # of the adapters
        add_lora(method.student, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    if settings.gradient_checkpointing:
        recompute_activations(method.student)
    trainer = DistillTrainer(
        method,
        training_arguments(settings, run.checkpoints(name), seed=run.config.seed),
        train_dataset=samples,
        processing_class=processor,
        part_rates=part_rates(settings),
        group_by_length=settings.group_by_length,
        run_config=weight_fields(run.config),
        log_file=run.path / "log.jsonl",
        log_fields={"stage": name},
    )
    trainer.train(resume_from_checkpoint=True)
    if settings.lora_rank:
        merge_lora(method.student)
    trainer.export_student(run.model(name))
    if trainer.is_world_process_zero():
        shutil.rmtree(run.checkpoints(name), ignore_errors=True)
