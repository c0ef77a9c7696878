"""A run's configuration: dataclasses, read from YAML files and the command line.

The text under a field is its help text. A YAML file has the same nesting, `--train.lr 1e-3` on the command
line wins over it, and a key that is not a field is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class DataConfig:
    """What is trained and judged on."""

    source: Literal["steel", "voc", "llava", "messages"] = "steel"
    """Rendered steel strip, a folder of Pascal VOC boxes, LLaVA JSON, or JSON lines with messages."""
    root: str | None = None
    """Folder of the data set (voc) or of the images (llava, messages); $VARIABLES in it are filled in."""
    train_split: str = "train"
    """Training part: name of the split (voc), or the file of conversations (llava, messages)."""
    test_split: str = "test"
    """Test part, named in the same way."""
    train_images: int | None = None
    """Images to train on; left out, all there are."""
    test_images: int | None = None
    """Images to judge on; left out, all there are."""
    kinds: tuple[str, ...] = ("exists", "classify", "count", "locate")
    """Kinds of question asked about images with boxes (steel, voc), each once an image."""
    image_seed: int = 0
    """Seed of the rendered images, of which images are picked, and of the questions."""
    max_length: int | None = None
    """Longest sample in tokens; a sample whose image tokens or whole answer would be cut is refused."""
    in_memory: bool = False
    """Encode all training samples once and keep them in memory: for small sets, 0.1 to 2 MB a picture."""

    max_bad_rate: float = 0.0
    """Share of bad samples or images that is skipped with a warning; above it the run stops before training."""
    first_pixel: int = 1
    """1: Pascal VOC, pixels 1 to width. 0: boxes written as edges, 0 to width."""

    def __post_init__(self):
        for name in ("train_images", "test_images"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"data.{name} is {count}, it must be 1 or more; left out, all there are")
        if not 0 <= self.max_bad_rate < 1:
            raise ValueError(f"data.max_bad_rate is {self.max_bad_rate}, it must be 0 or more and below 1")
        if self.first_pixel not in (0, 1):
            raise ValueError(f"data.first_pixel is {self.first_pixel}, it must be 0 or 1")

    def folder(self) -> Path:
        """`root` with its variables filled in; ValueError when it is not given or names an unset variable,
        FileNotFoundError when it is no folder."""
        if not self.root:
            raise ValueError(f"data.source is {self.source}: give data.root, the folder of the data")
        root = os.path.expandvars(self.root)
        if "$" in root:
            raise ValueError(f"data.root is {self.root} and that variable is not set: set it, or give --data.root")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.root is {root}, which is not a folder: give --data.root")
        return Path(root)


@dataclass(frozen=True)
class TeacherConfig:
    """The larger model that is learnt from."""

    path: str | None = None
    """Folder or Hub name; left out, the tiny teacher of the package."""
    steps: int = 0
    """Steps of supervised training on the run's data before it teaches; 0: none."""
    lr: float = 5e-4
    """Learning rate of those steps, of its vision tower too."""

    def __post_init__(self):
        _at_least("teacher", self, steps=0)
        if self.lr <= 0:
            raise ValueError(f"teacher.lr is {self.lr}, it must be above 0")


@dataclass(frozen=True)
class StudentConfig:
    """The smaller model that is made."""

    path: str | None = None
    """Folder or Hub name of a whole student; left out, one is assembled from the two parts below."""
    vision_tower: str | None = None
    """Folder or Hub name of the vision tower; left out, the tiny one of the package."""
    language_model: str | None = None
    """Folder or Hub name of the language model; left out, a tiny one with random weights."""
    vision_feature_layer: int | None = None
    """Layer of the vision tower that an assembled student's projector reads; left out, the last one of the
    package's tower and -2 of others."""
    chat_template: str | None = None
    """Chat template (Jinja) of an assembled student; left out, the language model's own, or ChatML."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: vision_tower, projector, language_model."""

    def __post_init__(self):
        if self.path and (self.vision_tower or self.language_model):
            part = "vision_tower" if self.vision_tower else "language_model"
            raise ValueError(f"student.path is {self.path} and student.{part} is also given: keep one of them")


@dataclass(frozen=True)
class MethodConfig:
    """How the student learns from the teacher; see `switchkd.SwitchKD`."""

    align: str | None = "dbild"
    """Divergence of the student's logits from the teacher's: dbild, bild, forward_kl, reverse_kl, jsd; null:
    none."""
    switch: str | None = "dbild"
    """Divergence of the switched logits (the student's features read by the teacher) from the teacher's;
    null: none."""
    align_weight: float = 1.0
    """Weight of the align term (lambda 1 of Eq. 1)."""
    switch_weight: float = 1.0
    """Weight of the switch term (lambda 2 of Eq. 1)."""
    align_options: dict[str, Any] = field(default_factory=dict)
    """Options of the align divergence, such as {temperature: 3.0}."""
    switch_options: dict[str, Any] = field(default_factory=dict)
    """Options of the switch divergence."""
    gradient_checkpointing: bool = False
    """Recompute the teacher's activations of the switch pass in backward: less memory, more time."""

    def __post_init__(self):
        _at_least("method", self, align_weight=0, switch_weight=0)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, the same for every method."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Samples of one process in one micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step; answer tokens of all of them weigh the same."""
    lr: float = 1e-3
    """Peak learning rate."""
    encoder_lr: float | None = None
    """Learning rate of the student's vision tower; left out, lr."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's weight decay; norms and biases are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    logging_steps: int = 10
    """Steps between two records in log.jsonl."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on the disk."""
    data_workers: int | None = None
    """Processes that decode and encode samples beside training; left out, 4 with a GPU and 0 without."""
    bf16: bool = False
    """Compute in bfloat16 under autocast, with the teacher's weights in bfloat16; the student's stay in float32,
    but under DeepSpeed, which trains them in bfloat16 with float32 copies."""

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
        least |= {"checkpoint_every": 0, "keep_checkpoints": 1, "weight_decay": 0, "max_grad_norm": 0}
        _at_least("train", self, **least)
        for name in ("lr", "encoder_lr"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise ValueError(f"train.{name} is {rate}, it must be above 0; student.freeze keeps a part as it is")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio is {self.warmup_ratio}, it must be 0 or more and below 1")


@dataclass(frozen=True)
class JudgeConfig:
    """How models answer the test questions."""

    batch_size: int = 64
    """Questions answered at once."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; a located answer that is cut counts as malformed."""

    def __post_init__(self):
        _at_least("judge", self, batch_size=1, max_new_tokens=1)


@dataclass(frozen=True)
class RunConfig:
    """One run: data, teacher, student, method, training and judging."""

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
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}, it must be the name of one folder")
        if "vision_tower" in self.student.freeze and self.train.encoder_lr is not None:
            raise ValueError(
                f"train.encoder_lr is {self.train.encoder_lr} but student.freeze names vision_tower: drop one of them"
            )

    @property
    def folder(self) -> Path:
        """`out/name`, the run folder."""
        return Path(self.out) / self.name


def load_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> RunConfig:
    """The configuration that command line arguments name (`sys.argv[1:]` by default).

    `--config FILE.yaml` reads a file, `--section.field value` sets one field; the later one wins. `--help`
    lists the fields. What is wrong (an unknown key, another type, a missing file) is one line on stderr, exit
    status 2.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file of the fields below.")
    parser.add_class_arguments(RunConfig)
    try:
        values = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
        del values["config"]
        for part in fields(RunConfig):
            if is_dataclass(part.default_factory) and not isinstance(values[part.name], Namespace):
                raise ValueError(f"{part.name} is {values[part.name]}, it must be a group of fields")
        return RunConfig(**vars(parser.instantiate(values)))
    except (ArgumentError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())} (--help lists the fields)", file=sys.stderr)
        raise SystemExit(2) from None


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write `config` as the YAML file that `load_config(["--config", path])` reads back to an equal one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def weight_fields(config: RunConfig) -> dict[str, Any]:
    """The fields that decide a run's weights, by dotted name: all but names, places, judging and what is kept."""
    free = ("data.root", "data.in_memory", "train.data_workers", "train.keep_checkpoints")
    free += ("train.logging_steps", "train.checkpoint_every")
    flat: dict[str, Any] = {"seed": config.seed}
    for part in ("data", "teacher", "student", "method", "train"):
        flat |= {f"{part}.{name}": item for name, item in asdict(getattr(config, part)).items()}
    return {name: item for name, item in flat.items() if name not in free}


def _at_least(section: str, config: Any, **least: float) -> None:
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}, it must be {smallest} or more")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
