"""The configuration of a run that makes a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from switchkd.config import Stage
from switchkd.data.config import DataConfig
from switchkd.evaluation.config import JudgeConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import Part, StudentConfig, TeacherConfig
from switchkd.training.config import TrainConfig

SECTIONS = ("data", "train", "method")  # of a stage or, where it has none of its own, of the run


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. Its student is where the next stage starts."""

    data: DataConfig | None = None
    """What this stage trains on; left out, the run's data. Of the last stage alone the test part is used."""
    train: TrainConfig | None = None
    """Optimisation of this stage; left out, the run's."""
    freeze: tuple[Part, ...] = ()
    """Parts that this stage does not train: vision_tower, projector, language_model."""
    method: SwitchKDConfig | None = None
    """How this stage learns from the teacher; left out, distil learns as the run's method says and the other stages by
    cross entropy alone."""


@dataclass(frozen=True)
class Run:
    """One run: its stages one after the other, then judging.

    The stages are teacher (where `teacher.steps` are given), pretrain, sft and distil, those that are there. `data`,
    `train` and `method` are the run's: every stage's that has none of its own.
    """

    name: str
    """Name of the run, and of its folder in `out`."""
    task: Literal["vlm"] = "vlm"
    """What the run makes: a vision-language model."""
    out: str = field(default="runs", metadata={"path": "always"})
    """Folder of all runs."""
    seed: int = 0
    """Seed of weights that start at random, of the order of the samples and of dropout."""
    resume: bool = False
    """Go on with the run of this name where it was interrupted; finished stages are not repeated."""
    threads: int | None = None
    """CPU threads of torch; left out, torch's own choice. Sums, and so weights, can differ with it."""
    tiny: bool = False
    """Rehearse: the same stages with tiny random parts of the same kinds and a dozen samples, on any machine."""
    undistilled: bool = True
    """Train distil a second time without the teacher, the control that the table sets beside the student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: SwitchKDConfig = field(default_factory=SwitchKDConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: StageConfig | None = None
    """The first stage, in LLaVA's recipe the projector alone, on captions; null: none."""
    sft: StageConfig | None = None
    """Supervised fine-tuning; null: none."""
    distil: StageConfig | None = field(default_factory=StageConfig)
    """Learning from the teacher; null: the run ends before it, as that of a teacher does."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}, it must be the name of one folder")
        stages = self.stages()
        if all(stage.name == "teacher" for stage in stages):
            raise ValueError("the run has no stage that trains a student: give pretrain, sft or distil")
        for stage in stages:
            _check(stage)
        if self.teacher.steps and not self.distils:
            raise ValueError(f"teacher.steps is {self.teacher.steps} but no stage learns from the teacher: drop it")
        for section, blank in zip(SECTIONS, (DataConfig(), TrainConfig(), SwitchKDConfig()), strict=True):
            reads = [stage for stage in stages if section != "method" or stage.method]
            if getattr(self, section) != blank and all(section in stage.own for stage in reads):
                own = ", ".join(dict.fromkeys(stage.field(section) for stage in reads))
                why = (
                    f"each has its own: set that of the stage you mean ({own})" if own else "none learns from a teacher"
                )
                raise ValueError(f"{section} is given but no stage reads it, for {why}, or drop {section}")

    def stages(self) -> list[Stage]:
        """The stages in order, each with its sections; before distil its control, where the run asks for one."""
        stages: list[Stage] = []
        if self.teacher.steps:
            train = replace(self.train, steps=self.teacher.steps, lr=self.teacher.lr, part_lr={})
            stages.append(Stage("teacher", None, "teacher", self.data, train))
        given = {name: each for name in ("pretrain", "sft", "distil") if (each := getattr(self, name)) is not None}
        start = None
        for name, section in given.items():
            last = name == list(given)[-1]
            data, train = section.data or self.data, section.train or self.train
            method = section.method or (self.method if name == "distil" else None)
            own = {each for each in SECTIONS if getattr(section, each) is not None} | {"freeze"}
            stage = Stage(
                name,
                start,
                "student" if last else name,
                data,
                train,
                section.freeze,
                method,
                frozenset(own),
            )
            if name == "distil" and self.undistilled:
                stages.append(replace(stage, name="undistilled", folder="undistilled", section="distil", method=None))
            stages.append(stage)
            start = name
        # Only the last stage's student is judged; stages of one data section go on sharing it.
        judged = stages[-1].data if stages else None
        return [
            stage if stage.data == judged else replace(stage, data=replace(stage.data, test_split=None))
            for stage in stages
        ]

    @property
    def last(self) -> Stage:
        """The stage that makes what the run is for."""
        return self.stages()[-1]

    @property
    def distils(self) -> bool:
        """Whether any stage learns from the teacher."""
        return any(stage.method for stage in self.stages())

    @property
    def folder(self) -> Path:
        """`out/name`, the run folder."""
        return Path(self.out) / self.name

    @property
    def checks(self) -> Path:
        """Where all runs of `out` keep what their start-up checks of large data sets found."""
        return Path(self.out) / ".checks"


def _check(stage: Stage) -> None:
    """ValueError where the sections of `stage` contradict each other."""
    train, frozen = stage.field("train"), stage.field("freeze")
    if set(stage.freeze) == set(get_args(Part)):
        raise ValueError(f"{frozen} names every part of the student, so that nothing is trained: leave one out")
    stage.train.check_parts(get_args(Part), train)
    for part, rate in stage.train.part_lr.items():
        if part in stage.freeze:
            raise ValueError(f"{train}.part_lr.{part} is {rate} but {frozen} names {part}: drop one of them")
    for part in (stage.train.lora_parts or ("language_model",)) if stage.train.lora_rank else ():
        if part not in get_args(Part):
            known = ", ".join(get_args(Part))
            raise ValueError(f"{train}.lora_parts names {part!r}, which is no part: known are {known}")
        if part in stage.freeze:
            raise ValueError(
                f"{train}.lora_rank is {stage.train.lora_rank}, with adapters on {part}, but {frozen} names it: drop "
                "one of them"
            )
    terms = ["loss", "ce", *(name for name in ("align", "switch", "feature") if getattr(stage.method, name, None))]
    measured = [f"eval_{term}" for term in terms]
    if stage.train.keep_best and stage.train.keep_best not in measured:
        raise ValueError(
            f"{train}.keep_best is {stage.train.keep_best}, and stage {stage.name} measures {', '.join(measured)}: "
            "take one of them"
        )
    if stage.method and not stage.method.distils:
        raise ValueError(
            f"every term of {stage.field('method')} is null, so that stage {stage.name} learns nothing of the teacher: "
            f"name one of align, switch and feature, or train without a teacher ({stage.name}: null, and a stage sft)"
        )
