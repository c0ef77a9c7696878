"""The configuration of a run that makes a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from switchkd.config import TrainConfig
from switchkd.data.config import DataConfig
from switchkd.evaluation.config import JudgeConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import Part, StudentConfig, TeacherConfig


@dataclass(frozen=True)
class StageConfig:
    """A stage of training before the last one; its student is where the next stage starts."""

    data: DataConfig
    """What this stage trains on; its test part is not used."""
    train: TrainConfig
    """Optimisation of this stage."""
    freeze: tuple[Part, ...] = ()
    """Parts that this stage does not train: vision_tower, projector, language_model."""
    method: SwitchKDConfig | None = None
    """How this stage learns from the teacher; null: cross entropy alone."""

    def without_test(self) -> StageConfig:
        """The same without a test part: only the last stage's student is judged."""
        return replace(self, data=replace(self.data, test_split=None))


@dataclass(frozen=True)
class Run:
    """One run: its stages one after the other, then judging.

    `data`, `method`, `train` and `student.freeze` are the last stage's; `pretrain` and `sft` come before it where
    they are given, each with data, train, freeze and method of its own.
    """

    name: str
    """Name of the run, and of its folder in `out`."""
    out: str = "runs"
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
    """Train the last stage a second time without the teacher, the control that the table sets beside the student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    pretrain: StageConfig | None = None
    """The first stage, in LLaVA's recipe the projector alone, on captions."""
    sft: StageConfig | None = None
    """Supervised fine-tuning before the last stage."""
    data: DataConfig = field(default_factory=DataConfig)
    method: SwitchKDConfig = field(default_factory=SwitchKDConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}, it must be the name of one folder")
        for prefix, stage in self.stages().items():
            frozen = "student.freeze" if prefix == "" else f"{prefix}freeze"
            if set(stage.freeze) == set(get_args(Part)):
                raise ValueError(f"{frozen} names every part of the student, so that nothing is trained: leave one out")
            for name, part in (("encoder_lr", "vision_tower"), ("projector_lr", "projector")):
                if part in stage.freeze and (rate := getattr(stage.train, name)) is not None:
                    raise ValueError(f"{prefix}train.{name} is {rate} but {frozen} names {part}: drop one of them")
            if "language_model" in stage.freeze and stage.train.lora_rank:
                raise ValueError(
                    f"{prefix}train.lora_rank is {stage.train.lora_rank} but {frozen} names language_model: drop one "
                    "of them"
                )

    def stages(self) -> dict[str, StageConfig]:
        """The stages in order, by the prefix of their fields: "pretrain.", "sft." and "" for the last."""
        method = self.method if self.method.distils else None
        last = StageConfig(self.data, self.train, self.student.freeze, method)
        earlier = {"pretrain.": self.pretrain, "sft.": self.sft}
        return {prefix: stage.without_test() for prefix, stage in earlier.items() if stage is not None} | {"": last}

    @property
    def folder(self) -> Path:
        """`out/name`, the run folder."""
        return Path(self.out) / self.name

    @property
    def checks(self) -> Path:
        """Where all runs of `out` keep what their start-up checks of large data sets found."""
        return Path(self.out) / ".checks"
