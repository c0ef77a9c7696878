"""What a ten-skills experiment of one size is made of: models, samples, steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

SEEDS = (0, 1, 2)  # variants are chosen on these, and on the validation split
CONFIRM_SEEDS = (3, 4, 5)  # and confirmed on these, and on the test split


@dataclass(frozen=True)
class Size:
    """One size of the experiment; widths, layers and steps of everything that is trained.

    vision, teacher, student: width and layers of the vision tower (one for both, as in a TinyLLaVA pair) and of the
    language models. narrow: those of the tower of the students that need a switch adapter.
    tower_steps, apart_steps: dense pretraining of the teacher's tower and of the students' own one, which lies apart
    from it. captioned: the share of the teacher's samples that tell what their picture shows instead of a question's
    answer (`Feed.of`); a teacher only asked stayed at chance on four skills. start_steps: on captions alone, which
    every student has behind it when the variants part; its tower is frozen there, as in TinyLLaVA's pretraining.
    steps: of each run; `equal flops` has more. samples: that a run draws its batches from. judged: samples of the
    validation and of the test split. `batch_size` holds for all but the towers and the teacher. bf16: bfloat16
    autocast.
    evidence: False marks results as a check of the machinery.
    """

    name: str
    image: int
    patch: int
    vision: tuple[int, int]
    teacher: tuple[int, int]
    student: tuple[int, int]
    narrow: tuple[int, int]
    tower_steps: int
    apart_steps: int
    tower_batch: int
    tower_lr: float
    teacher_steps: int
    teacher_samples: int
    teacher_lr: float
    captioned: float
    start_steps: int
    steps: int
    samples: int
    batch_size: int
    teacher_batch: int
    lr: float
    judged: int
    bf16: bool
    evidence: bool
    pieces: tuple[str, ...]

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2

    def settings(self) -> dict:
        """What decides a run's result; which pieces are run does not."""
        return {name: value for name, value in asdict(self).items() if name not in ("pieces", "evidence")}

    def teacher_settings(self) -> dict:
        """What decides the teacher: its weights are kept where only the students' settings change."""
        own = ("vision", "teacher", "tower_steps", "tower_batch", "tower_lr")
        own += ("teacher_steps", "teacher_samples", "teacher_lr", "teacher_batch", "captioned", "bf16")
        return {name: value for name, value in self.settings().items() if name in ("name", "image", "patch", *own)}


SIZES = {
    "cpu": Size(
        name="cpu",
        image=48,
        patch=12,
        vision=(64, 3),
        teacher=(96, 3),
        student=(48, 2),
        narrow=(48, 2),
        tower_steps=450,
        apart_steps=100,
        tower_batch=64,
        tower_lr=2e-3,
        teacher_steps=2000,
        teacher_samples=66_000,
        teacher_lr=3e-3,
        captioned=0.5,
        start_steps=200,
        steps=700,
        samples=33_000,
        batch_size=32,
        teacher_batch=64,
        lr=3e-3,
        judged=2200,
        bf16=False,
        evidence=False,
        pieces=("few",),
    ),
    "gpu": Size(
        name="gpu",
        image=48,
        patch=8,
        vision=(192, 4),
        teacher=(256, 6),
        student=(128, 4),
        narrow=(128, 3),
        tower_steps=3000,
        apart_steps=200,
        tower_batch=256,
        tower_lr=1e-3,
        teacher_steps=6000,
        teacher_samples=660_000,
        teacher_lr=1e-3,
        captioned=0.5,
        start_steps=200,
        steps=500,
        samples=128_700,
        batch_size=256,
        teacher_batch=256,
        lr=1e-3,
        judged=11_000,
        bf16=True,
        evidence=True,
        pieces=("core", "divergence", "knee", "temperature", "weights", "encoder", "visual", "schedule", "seen"),
    ),
}
