"""The task `vlm`: a small vision-language model learns from a big one."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, set_seed

from switchkd.config import Stage
from switchkd.data import Collator, Conversation
from switchkd.evaluation.judge import Row, judge_models
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.models import freeze, load_llava, same_inputs, shared_vocab
from switchkd.models.adapter import LinearAdapter, fit_switch_adapter
from switchkd.models.config import TeacherConfig
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora, check_lora, merge_lora, save_adapter
from switchkd.models.pair import as_teacher_reads
from switchkd.models.pathway import pathway_of
from switchkd.models.processor_checks import check_processor
from switchkd.models.students import build_student as build_model
from switchkd.models.tiny import TEACHER
from switchkd.runs import RESULTS, RunFolder
from switchkd.tasks.vlm_config import Run
from switchkd.tasks.vlm_data import StageData
from switchkd.tasks.vlm_rehearsal import rehearse
from switchkd.training.trainer import DistillTrainer

# Parameter name prefixes in a method, by part; the language model's head belongs to it.
PARTS = {
    "vision_tower": ("student.model.vision_tower",),
    "projector": ("student.model.multi_modal_projector",),
    "language_model": ("student.model.language_model", "student.lm_head"),
}

__all__ = [
    "PARTS",
    "Run",
    "build_method",
    "build_student",
    "collate",
    "export",
    "judge",
    "load",
    "rehearse",
    "samples",
]


@dataclass
class Loaded:
    """What a run of this task has read and checked before it trains.

    config: the run's, with what the student takes from its teacher filled in. data: of every stage. questions: what the
    models are judged on. shared_vocab: the vocabulary rows that student and teacher share. teacher: the one that was
    loaded last, with its processor and what it was loaded from and as; None where no stage has one.
    """

    config: Run
    data: StageData
    questions: list[Conversation]
    shared_vocab: int | None = None
    teacher: tuple[LlavaForConditionalGeneration, LlavaProcessor] | None = None
    teacher_source: tuple[str, torch.dtype, str | None] | None = None

    @property
    def processor(self) -> LlavaProcessor:
        """The student's."""
        return self.data.processor


def load(config: Run) -> Loaded:
    """Reads models and data, and tries what every stage and the judging will need: what cannot run, a pair that cannot
    be switched or samples that cannot be read, ends here, before any training."""
    stages = config.stages()
    distilled = [stage for stage in stages if stage.method]
    teacher = shared = source = None
    if distilled:
        source = (str(config.teacher.path or TEACHER), _dtype(distilled[0]), distilled[0].train.attn_implementation)
        teacher, teachers_processor = _load_teacher(config.teacher, *source)
        check_processor(teacher, teachers_processor, "teacher")
        config = replace(config, student=as_teacher_reads(config.student, config.teacher, teachers_processor))
        stages = config.stages()
    set_seed(config.seed)
    student, processor = build_model(config.student)
    check_processor(student, processor, "student")
    if distilled:
        shared = shared_vocab(processor.tokenizer, teachers_processor.tokenizer)
        same_inputs(processor, teachers_processor)
    for stage in stages:
        if stage.name != "teacher":
            _attend(student, stage.train.attn_implementation, stage.field("train"))
            freeze(student, stage.freeze)
            method_of(stage, student, teacher, shared)
    check_lora(student, stages)
    _check_export(config, student, processor)
    del student
    data = StageData(config, stages, processor)
    questions = data.questions(config.last.data)
    PartialState().print(f"{len(questions):,} test questions" if questions else "no test part: nothing is judged")
    return Loaded(config, data, questions, shared, teacher and (teacher, teachers_processor), source)


def build_student(loaded: Loaded, stage: Stage, run: RunFolder) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model that `stage` trains as the stage starts with it, its frozen parts frozen, and its processor; random
    parts follow the seed. For the stage teacher it is the teacher."""
    config = loaded.config
    set_seed(config.seed)
    if stage.name == "teacher":
        model, processor = _load_teacher(config.teacher, config.teacher.path or TEACHER)
    elif stage.start is None:
        model, processor = build_model(config.student)
    else:
        model, processor = load_llava(run.model(stage.start))  # its folder too: only the last stage has another
    _attend(model, stage.train.attn_implementation, stage.field("train"))
    freeze(model, stage.freeze)
    return model, processor


def build_method(loaded: Loaded, stage: Stage, student: LlavaForConditionalGeneration, run: RunFolder) -> nn.Module:
    """What `stage` trains: Switch-KD where it has a method, cross entropy alone elsewhere; through LoRA where it says
    so."""
    teacher = adapter = None
    if stage.method:
        teacher, _ = _teacher_of(loaded, stage, run)
        if stage.method.switch_adapter:
            adapter = fit_adapter(student, teacher, samples(loaded, stage))
    method = method_of(stage, student, teacher, loaded.shared_vocab, adapter)
    train = stage.train
    if train.lora_rank:
        set_seed(loaded.config.seed)  # of the adapters
        add_lora(student, train.lora_rank, train.lora_alpha, train.lora_dropout, train.lora_parts)
    if train.gradient_checkpointing:
        recompute_activations(student)
    return method


def samples(loaded: Loaded, stage: Stage) -> Any:
    """The training samples of `stage`."""
    return loaded.data.samples(stage.data)


def collate(loaded: Loaded, stage: Stage) -> Callable[[list], dict]:
    """What makes a batch of the samples of `stage`."""
    return Collator(loaded.processor.tokenizer.pad_token_id)


def export(trainer: DistillTrainer, stage: Stage, run: RunFolder) -> None:
    """The stock checkpoint of what `stage` trained, its adapters merged, and beside it the adapters alone."""
    if stage.train.lora_rank:
        save_adapter(trainer.method.student, run.model(f"{stage.folder}-adapter"), write=trainer.args.should_save)
        merge_lora(trainer.method.student)
    trainer.export_student(run.model(stage.folder))


def judge(loaded: Loaded, run: RunFolder) -> None:
    """Every model of the run answers the test questions: a table, the scores and the answers in the run's folder.

    The blind row is the last student with every picture replaced by an even grey one.
    """
    if not loaded.questions:
        if PartialState().is_main_process:
            run.write(RESULTS, {})
        return
    config, rows = loaded.config, []
    stages = {stage.name: stage for stage in config.stages()}
    if config.distils:
        rows.append(Row("teacher", *_teacher_of(loaded, config.last, run)))
    if "undistilled" in stages:
        rows.append(Row("undistilled", *load_llava(run.model("undistilled"))))
    name = "Switch-KD" if config.last.method else config.name
    student = load_llava(run.model(config.last.folder))
    rows += [Row(name, *student), Row(f"{name}, blind", *student, blank=True)]
    judge_models(run, rows, loaded.questions)


def _check_export(config: Run, student: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Tries what ends every stage: OSError where its processor cannot be saved, or where the disk of `out` has no room
    for the stages' stock checkpoints, which are float32."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
    stages = [stage for stage in config.stages() if stage.name != "teacher"]
    if config.resume:
        stages = [stage for stage in stages if not (config.folder / stage.folder).exists()]
    needed = 4 * len(stages) * sum(parameter.numel() for parameter in student.parameters())
    there = next(each for each in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if each.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise OSError(
            f"out is {config.out}, whose disk has {free / 1e9:.1f} GB free, and {len(stages)} stages leave students of "
            f"{needed / 1e9:.1f} GB: free some, or give another --out"
        )


def method_of(
    stage: Stage,
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration | None,
    shared_vocab: int | None,
    switch_adapter: LinearAdapter | None = None,
) -> nn.Module:
    """switch_adapter: the fitted one, where the method has one; without it, as a check of the pair needs, one at its
    random start."""
    if stage.method is None:
        return SupervisedMethod(student)
    options = asdict(stage.method)
    if options.pop("switch_adapter") and switch_adapter is None:
        switch_adapter = LinearAdapter.between(student, teacher)
    return SwitchKD(student, teacher, shared_vocab=shared_vocab, switch_adapter=switch_adapter, **options)


def _teacher_of(loaded: Loaded, stage: Stage, run: RunFolder) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The teacher that `stage` has and its processor: the trained one where the run trained it, in the stage's own
    precision."""
    config = loaded.config
    path = run.model("teacher") if config.teacher.steps else config.teacher.path or TEACHER
    source = (str(path), _dtype(stage), stage.train.attn_implementation)
    if loaded.teacher_source != source:
        loaded.teacher = None  # freed before the next one takes its place
        loaded.teacher, loaded.teacher_source = _load_teacher(config.teacher, *source), source
    return loaded.teacher


def _dtype(stage: Stage) -> torch.dtype:
    return torch.bfloat16 if stage.train.bf16 else torch.float32


def _load_teacher(
    teacher: TeacherConfig, path: str | Path, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The teacher and its processor, with the chat template that the configuration names for it."""
    if teacher.made_by and not Path(path).exists():
        raise FileNotFoundError(
            f"teacher.path is {path}, which does not exist: make it with accelerate launch recipes/train_vlm.py "
            f"--config {teacher.made_by}, or name another teacher"
        )
    model, processor = load_llava(path, dtype, field="teacher.path", chat_template=teacher.chat_template)
    _attend(model, attention, "train")
    return model, processor


def _attend(model: LlavaForConditionalGeneration, attention: str | None, field: str) -> None:
    """Lets every part of `model` compute attention in that way; None: in the way that it has.

    Raises ValueError naming `field` where this machine, or a part of the model, cannot.
    """
    if attention is None:
        return
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{field}.attn_implementation is {attention}: {error}; leave it out, or take sdpa") from error


def fit_adapter(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, samples: Any, count: int = 256
) -> LinearAdapter:
    """The switch adapter of the pair, fitted on the pictures of up to `count` samples spread evenly over all."""
    state = PartialState()
    for model in (student, teacher):
        pathway_of(model).part("vision_tower").to(state.device)
    spread = (samples[index] for index in range(0, len(samples), math.ceil(len(samples) / count)))
    adapter = fit_switch_adapter(student, teacher, (s["pixel_values"] for s in spread if "pixel_values" in s))
    state.print(f"switch adapter: explains {adapter.r2:.1%} of the variance of the teacher's vision features (R2)")
    return adapter
