"""The plan of a run: every stage's parameters, arithmetic, memory and time, and the disk.

Every stage's own method is measured on models without data (`switchkd.plan.costs`); times follow from the arithmetic, a
GPU's peak rate and a stated share of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from switchkd.config import Stage
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.models import freeze
from switchkd.models.adapter import LinearAdapter
from switchkd.models.llava import recompute_activations
from switchkd.models.lora import add_lora
from switchkd.models.pair import as_teacher_reads, teacher_processor
from switchkd.models.pathway import pathway_of
from switchkd.models.planned import student_config, teacher_config
from switchkd.plan.checks import (
    Problem,
    check_memory,
    check_room,
    check_run,
    check_steps,
    check_tokenizers,
    check_towers,
    same_towers,
)
from switchkd.plan.costs import CASTS, GRADIENTS, LANGUAGE_MODEL, TOWER, StepCost, part_parameters, step_cost
from switchkd.plan.fakes import Batch, WithoutData, fake, meta_llava
from switchkd.plan.gpus import ALLOWANCE, ENGINES, Gpu, find_gpu, kept_memory, shared_gradients
from switchkd.plan.repeats import Repeated, shorten
from switchkd.plan.survey import Survey, local_processor, survey
from switchkd.tasks.vlm_config import Run
from switchkd.training.config import TrainConfig

Parameters = dict[str, tuple[int, int]]  # part -> trained, frozen


@dataclass(frozen=True)
class StagePlan:
    """One stage. `config`: as it is trained. `survey`: its samples. flops: of one sample by (part, pass). memory: bytes
    at the peak on one GPU, in the longest batch. steps and hours are None where nothing says how many samples there
    are; flops and memory are empty where the stage could not start."""

    name: str
    config: Stage
    survey: Survey
    parameters: Parameters
    accumulation: int
    steps: int | None
    flops: dict[tuple[str, str], float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    samples_a_second: float | None = None
    hours: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run's stages on `gpus` GPUs. visual_tokens: of one image. student, teacher: their parameters, {} without a
    teacher. disk: bytes by what they are for. problems: what would end the run, and what is worth knowing. assumed:
    what this plan does not know."""

    config: Run
    gpu: Gpu
    gpus: int
    engine: str
    efficiency: float
    visual_tokens: int
    student: Parameters
    teacher: Parameters
    stages: list[StagePlan]
    disk: dict[str, int]
    problems: list[Problem]
    assumed: list[str]

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages; None where one of them is unknown."""
        hours = [stage.hours for stage in self.stages]
        return None if None in hours else sum(hours) * self.gpus


def make_plan(config: Run, *, gpu: str = "h100", gpus: int = 8, engine: str = "ddp", efficiency: float = 0.25) -> Plan:
    """The plan of every stage of `config` on `gpus` GPUs of a kind (`switchkd.plan.gpus.GPUS`).

    engine: ddp, zero2 or zero3. efficiency: share of the GPU's dense bfloat16 peak that training reaches; the default
    is about what our true-size step on an H200 did (234 of 989 TFLOP/s). Shapes come from folders, from the package's
    table, or from the Hub for other names. Raises ValueError and FileNotFoundError where an argument is unknown or the
    shape of a part cannot be found; what is wrong with the run itself is in `Plan.problems`.
    """
    card = find_gpu(gpu)
    if engine not in ENGINES:
        raise ValueError(f"--engine is {engine}: known are {', '.join(ENGINES)}")
    if gpus < 1 or not 0 < efficiency <= 1:
        raise ValueError(f"--gpus is {gpus} and --efficiency {efficiency}: give 1 or more, and a share above 0 up to 1")
    return _Planner(config, card, gpus, engine, efficiency).plan()


class _Planner:
    """Collects problems and assumptions while it goes through the stages."""

    def __init__(self, config: Run, gpu: Gpu, gpus: int, engine: str, efficiency: float):
        self.config, self.gpu, self.gpus, self.engine, self.efficiency = config, gpu, gpus, engine, efficiency
        self.problems: list[Problem] = []
        self.assumed: list[str] = []
        self.surveys: dict[tuple, Survey] = {}
        if config.distils:
            teachers = teacher_processor(config.teacher, local_files_only=True)
            self.config = config = replace(config, student=as_teacher_reads(config.student, config.teacher, teachers))
        self.runs = config.stages()
        self.student_shape = student_config(config.student)
        distils = config.distils
        self.teacher_shape = None
        if distils or config.teacher.steps:
            self.teacher_shape = teacher_config(config.teacher)
        student = meta_llava(self.student_shape)
        self.visual_tokens = pathway_of(student).visual_token_count
        self.student = part_parameters(student)
        self.teacher = part_parameters(meta_llava(self.teacher_shape)) if self.teacher_shape else {}
        self.processor = local_processor(config.student)
        self.shared_rows = None
        if distils:
            self.shared_rows = check_tokenizers(
                config, self.student_shape, self.teacher_shape, self.processor, self.problems, self.assumed
            )

    def plan(self) -> Plan:
        stages = [self._stage(stage) for stage in self.runs]
        check_run(self.config, len(stages), self.engine, self.problems)
        return Plan(
            self.config,
            self.gpu,
            self.gpus,
            self.engine,
            self.efficiency,
            self.visual_tokens,
            self.student,
            self.teacher,
            stages,
            self._disk(stages),
            self.problems,
            self.assumed,
        )

    def _stage(self, stage: Stage) -> StagePlan:
        student = self._start(stage)
        parameters, repeated = part_parameters(student), shorten(student)
        fake(student)
        found = self._survey(stage)
        # The undistilled student is the last stage with less in it: what goes wrong is said once, of the last stage.
        problems = [] if stage.name == "undistilled" else self.problems
        problems += [Problem(name, text) for name, text in found.faults]
        assumed = f"{stage.field('data')}, {found.assumed}"
        if found.assumed and assumed not in self.assumed:
            self.assumed.append(assumed)
        steps, accumulation = check_steps(stage, found.samples, self.gpus, problems)
        planned = StagePlan(stage.name, stage, found, parameters, accumulation, steps)
        equal = same_towers(self.config, stage.name, self.student_shape, self.teacher_shape)
        try:
            with WithoutData(equal=equal is True and "vision_tower" in stage.freeze):
                method = self._method(stage, student, repeated)
        except ValueError as error:
            problems.append(Problem(stage.field("method"), str(error)))
            return planned
        if stage.method and (stage.method.switch or stage.method.feature):
            check_towers(equal, stage.field("method"), problems)
        if not check_room(planned, self.visual_tokens, problems):
            return planned
        cost = self._cost(method, stage.train, found, found.longest, repeated)
        flops = cost.flops_at(found.padded, of=found.longest)
        if flops is None or found.padded - self.visual_tokens < found.answers:
            flops = self._cost(method, stage.train, found, found.padded, repeated).flops
        memory = self._memory(cost, planned, method)
        check_memory(memory, planned, self.gpu, self.gpus, self.engine, problems)
        flops = {key: count / stage.train.batch_size for key, count in flops.items()}
        rate = self.gpu.tflops * 1e12 * self.efficiency * self.gpus / sum(flops.values())
        seen = steps and steps * accumulation * stage.train.batch_size * self.gpus
        hours = seen and seen / rate / 3600
        return replace(planned, flops=flops, memory=memory, samples_a_second=rate, hours=hours)

    def _survey(self, stage: Stage) -> Survey:
        train = stage.train
        key = (stage.data, train.batch_size, train.group_by_length)
        if key not in self.surveys:
            self.surveys[key] = survey(
                stage.data,
                self.processor,
                self.visual_tokens,
                field=stage.field("data"),
                batch_size=train.batch_size,
                group_by_length=train.group_by_length,
            )
        return self.surveys[key]

    def _start(self, stage: Stage) -> PreTrainedModel:
        """The student as the stage trains it, on the meta device."""
        train = stage.train
        # DeepSpeed trains bfloat16 weights; elsewhere they are float32 and autocast computes in bfloat16.
        dtype = torch.bfloat16 if train.bf16 and self.engine != "ddp" else torch.float32
        student = meta_llava(self.teacher_shape if stage.name == "teacher" else self.student_shape, dtype)
        freeze(student, stage.freeze)
        if train.lora_rank:
            add_lora(student, train.lora_rank, train.lora_alpha, train.lora_dropout, train.lora_parts)
        if train.gradient_checkpointing:
            recompute_activations(student)
        return student

    def _method(self, stage: Stage, student: PreTrainedModel, repeated: list[Repeated]) -> nn.Module:
        """`repeated`: the student's layers that stand for several; the teacher's are added."""
        if stage.method is None:
            return SupervisedMethod(student)
        teacher = meta_llava(self.teacher_shape, torch.bfloat16 if stage.train.bf16 else torch.float32)
        repeated += shorten(teacher)
        fake(teacher)
        options = asdict(stage.method)
        if stage.method.switch_adapter:
            with torch.device("meta"):
                adapter = LinearAdapter.between(student, teacher)
            options["switch_adapter"] = fake(adapter)
        return SwitchKD(student, teacher, shared_vocab=self.shared_rows, **options)

    def _cost(
        self, method: nn.Module, train: TrainConfig, found: Survey, tokens: int, repeated: list[Repeated]
    ) -> StepCost:
        answers = min(found.answers, tokens - pathway_of(method.student).visual_token_count)
        batch = Batch(train.batch_size, tokens, answers).tensors(method.student)
        return step_cost(method, batch, autocast=train.bf16 and self.engine == "ddp", repeated=repeated)

    def _memory(self, cost: StepCost, stage: StagePlan, method: nn.Module) -> dict[str, int]:
        # An adapter between the towers is the method's, not the student's.
        adapter = getattr(method, "switch_adapter", None)
        trained = _trained(stage.parameters) + sum(each.numel() for each in (adapter.parameters() if adapter else ()))
        teacher = _count(self.teacher) if stage.config.method else 0
        memory = kept_memory(
            parameters=_count(stage.parameters),
            trained=trained,
            teacher=teacher,
            engine=self.engine,
            gpus=self.gpus,
            bf16=stage.config.train.bf16,
            teacher_bf16=stage.config.train.bf16,
        )
        alone = self.engine == "ddp" and stage.accumulation == 1
        step = dict(cost.memory if alone else cost.accumulating)
        memory[GRADIENTS] = shared_gradients(step.pop(GRADIENTS, 0), self.engine, self.gpus)
        activations = {f"activations, {part}": size for part, size in step.items() if part != CASTS}
        return {**memory, CASTS: step.get(CASTS, 0), **activations, "context and workspaces": ALLOWANCE}

    def _disk(self, stages: list[StagePlan]) -> dict[str, int]:
        """Bytes; checkpoints of one stage at a time, for a finished stage's are removed."""
        checkpoints, exports = 0, 0
        for stage in stages:
            parameters = _count(stage.parameters)
            trained = _trained(stage.parameters)
            half = stage.config.train.bf16 and self.engine != "ddp"
            whole = (2 * parameters + 12 * trained) if half else (4 * parameters + 8 * trained)
            if stage.config.train.checkpoint_every:
                # One more than is kept, while it is written.
                checkpoints = max(checkpoints, (stage.config.train.keep_checkpoints + 1) * whole)
            exports += (2 if half else 4) * parameters
        return {"weights to download": self._downloads(), "checkpoints": checkpoints, "students of the stages": exports}

    def _downloads(self) -> int:
        """At least: public language models and teachers are files of 2 bytes a parameter, vision towers of 4; the file
        of a tower can hold a text encoder too."""
        student, teacher = self.config.student, self.config.teacher
        files = [
            (student.path, 2 * _count(self.student)),
            (student.vision_tower, 4 * sum(self.student[TOWER])),
            (student.language_model, 2 * sum(self.student[LANGUAGE_MODEL])),
            (None if teacher.made_by else teacher.path, 2 * _count(self.teacher)),
        ]
        return sum(size for name, size in files if name and not Path(name).is_dir())


def _count(parameters: Parameters) -> int:
    return sum(map(sum, parameters.values()))


def _trained(parameters: Parameters) -> int:
    return sum(trained for trained, _ in parameters.values())
