"""The two models of a run: the `teacher` and `student` sections of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from switchkd.config import at_least, refuse_unread

Part = Literal["vision_tower", "projector", "language_model"]


@dataclass(frozen=True)
class TeacherConfig:
    """The larger model that is learnt from."""

    path: str | None = field(default=None, metadata={"path": "where it is there"})
    """Folder or Hub name; left out, what `made_by` makes, and without that the tiny teacher of the package."""
    made_by: str | None = field(default=None, metadata={"path": "always"})
    """Configuration file of the run that makes the teacher, OUT/NAME/student by its own name; `switchkd plan` and a
    rehearsal read its parts while that does not exist yet."""
    chat_template: str | None = None
    """Chat template (Jinja) that the teacher was trained with, where its folder names another one or none."""
    steps: int = 0
    """Steps of supervised training on the run's data before it teaches; 0: none."""
    lr: float = 5e-4
    """Learning rate of those steps, of its vision tower too."""

    def __post_init__(self):
        at_least("teacher", self, steps=0)
        if self.lr <= 0:
            raise ValueError(f"teacher.lr is {self.lr}, it must be above 0")
        if not self.steps:
            why = "teacher.steps is 0, so that the teacher is not trained: give teacher.steps"
            refuse_unread("teacher", self, ("lr",), why)
        if not (self.path or self.made_by):
            why = (
                "teacher.path is not given, and the package's teacher has its own: name the teacher that it belongs to"
            )
            refuse_unread("teacher", self, ("chat_template",), why)


@dataclass(frozen=True)
class StudentConfig:
    """The smaller model that is made."""

    path: str | None = field(default=None, metadata={"path": "where it is there"})
    """Folder or Hub name of a whole student; left out, one is assembled from the two parts below."""
    vision_tower: str | None = field(default=None, metadata={"path": "where it is there"})
    """Folder or Hub name of the vision tower; left out, the tiny one of the package."""
    language_model: str | None = field(default=None, metadata={"path": "where it is there"})
    """Folder or Hub name of the language model; left out, a tiny one with random weights."""
    vision_feature_layer: int | None = None
    """Layer of the vision tower that an assembled student's projector reads; left out, the last one of the
    package's tower and -2 of others."""
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    """default: the first visual token is dropped (CLIP's class token; TinyLLaVA drops SigLIP's first patch too); full:
    all are kept. Left out, as the teacher named by teacher.path does, and without one default for CLIP and full for
    SigLIP."""
    chat_template: str | None = None
    """Chat template (Jinja); left out, a whole student's own, and for an assembled one that of the teacher named by
    teacher.path, or without one the language model's own, or ChatML."""
    image_processor: str | None = field(default=None, metadata={"path": "where it is there"})
    """Folder or Hub name whose picture settings (size, crop, mean) an assembled student takes; left out, those
    saved beside its vision tower, and where there are none a square of the tower's size."""

    def __post_init__(self):
        if self.path and (self.vision_tower or self.language_model):
            part = "vision_tower" if self.vision_tower else "language_model"
            raise ValueError(f"student.path is {self.path} and student.{part} is also given: keep one of them")
        if self.path:
            why = f"student.path is {self.path}, a whole student with its own: drop student.path to assemble one"
            unread = ("vision_feature_layer", "vision_feature_select_strategy", "image_processor")
            refuse_unread("student", self, unread, why)
