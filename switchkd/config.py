"""A run's configuration: dataclasses, read from YAML files and the command line.

The text under a field is its help text. A YAML file has the same nesting, `--train.lr 1e-3` on the command
line wins over it, and a key that is not a field is an error.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Part = Literal["vision_tower", "projector", "language_model"]


@dataclass(frozen=True)
class PartConfig:
    """One more part of a mixture of training data."""

    source: Literal["voc", "llava", "messages"]
    """A folder of Pascal VOC boxes, LLaVA JSON, or messages (JSON lines or parquet)."""
    root: str
    """Folder of the data set (voc) or of the images (llava, messages); $VARIABLES in it are filled in."""
    split: str
    """Name of the split (voc), or the file of conversations (llava, messages)."""
    weight: float = 1.0
    """How often each conversation is seen in one epoch: 0.5 takes a random half of them, 2 takes each twice."""

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"data.mixture: the weight of {self.split} is {self.weight}, it must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """What is trained and judged on."""

    source: Literal["steel", "voc", "llava", "messages"] = "steel"
    """Rendered steel strip, a folder of Pascal VOC boxes, LLaVA JSON, or messages (JSON lines or parquet)."""
    root: str | None = None
    """Folder of the data set (voc) or of the images (llava, messages); $VARIABLES in it are filled in."""
    train_split: str = "train"
    """Training part: name of the split (voc), or the file of conversations (llava, messages; $VARIABLES in it are
    filled in)."""
    test_split: str | None = "test"
    """Test part, named in the same way; null: none, and nothing is judged."""
    mixture: tuple[PartConfig, ...] = ()
    """Further training parts, each with source, root, split and weight."""
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
        root = filled_in(self.root, "data.root")
        if not root.is_dir():
            raise FileNotFoundError(f"data.root is {root}, which is not a folder: give --data.root")
        return root


@dataclass(frozen=True)
class TeacherConfig:
    """The larger model that is learnt from."""

    path: str | None = None
    """Folder or Hub name; left out, the tiny teacher of the package."""
    made_by: str | None = None
    """Configuration file of recipes/train_vlm.py that makes the teacher; `switchkd plan` and a rehearsal read its
    parts while `path` does not exist yet."""
    chat_template: str | None = None
    """Chat template (Jinja) that the teacher was trained with, where its folder names another one or none."""
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
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    """default: the first visual token is dropped (CLIP's class token; TinyLLaVA drops SigLIP's first patch too); full:
    all are kept. Left out, as the teacher named by teacher.path does, and without one default for CLIP and full for
    SigLIP."""
    chat_template: str | None = None
    """Chat template (Jinja) of an assembled student; left out, that of the teacher named by teacher.path, and without
    one the language model's own, or ChatML."""
    image_processor: str | None = None
    """Folder or Hub name whose picture settings (size, crop, mean) an assembled student takes; left out, those
    saved beside its vision tower, and where there are none a square of the tower's size."""
    freeze: tuple[Part, ...] = ()
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
    null: none. With align, switch and feature null nothing is distilled: cross entropy alone."""
    feature: Literal["cosine", "relation"] | None = None
    """Distance of the vision tower's features from the teacher's: cosine (of each visual token) or relation (of the
    matrix of likenesses between visual tokens); null: none."""
    align_weight: float = 1.0
    """Weight of the align term (lambda 1 of Eq. 1)."""
    switch_weight: float = 1.0
    """Weight of the switch term (lambda 2 of Eq. 1)."""
    feature_weight: float = 1.0
    """Weight of the feature term."""
    align_options: dict[str, Any] = field(default_factory=dict)
    """Options of the align divergence, such as {temperature: 3.0}."""
    switch_options: dict[str, Any] = field(default_factory=dict)
    """Options of the switch divergence."""
    switch_adapter: Literal["linear"] | None = None
    """Where the student's vision tower has another width or another number of visual tokens than the teacher's: linear
    fits a map onto the teacher's features, by least squares on 256 samples, and trains it along; null: none."""
    gradient_checkpointing: bool = False
    """Recompute the teacher's activations of the switch pass in backward: less memory, more time."""

    def __post_init__(self):
        _at_least("method", self, align_weight=0, switch_weight=0, feature_weight=0)
        if self.switch_adapter and not self.switch and not self.feature:
            raise ValueError(
                f"method.switch_adapter is {self.switch_adapter} but method.switch and method.feature are null, and no "
                "other term reads it: set one of them, or drop the adapter"
            )

    @property
    def distils(self) -> bool:
        """Whether any term compares the student with the teacher."""
        return any((self.align, self.switch, self.feature))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, the same for every method."""

    steps: int | None = None
    """Optimizer steps; left out, `epochs` passes over the samples."""
    epochs: float = 1.0
    """Passes over the samples where `steps` is left out."""
    batch_size: int = 16
    """Samples of one process in one micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer step; answer tokens of all of them weigh the same."""
    global_batch_size: int | None = None
    """Samples of one optimizer step over all processes, whatever their number: sets the accumulation steps."""
    group_by_length: bool = False
    """Batches of samples of about one length, in random order: less padding where lengths differ."""
    lr: float = 1e-3
    """Peak learning rate."""
    encoder_lr: float | None = None
    """Learning rate of the student's vision tower; left out, lr."""
    projector_lr: float | None = None
    """Learning rate of the student's projector; left out, lr."""
    lora_rank: int | None = None
    """Train the language model through LoRA adapters of this rank, merged into it at the end of the stage; left out,
    all its weights."""
    lora_alpha: float | None = None
    """Scale of the adapters, alpha over rank; left out, twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before each adapter."""
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
    gradient_checkpointing: bool = False
    """Recompute the student's activations in backward: less memory, more time."""
    bf16: bool = False
    """Compute in bfloat16 under autocast, with the teacher's weights in bfloat16; the student's stay in float32,
    but under DeepSpeed, which trains them in bfloat16 with float32 copies."""

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
        least |= {"checkpoint_every": 0, "keep_checkpoints": 1, "weight_decay": 0, "max_grad_norm": 0}
        least |= {"global_batch_size": 1, "lora_rank": 1}
        _at_least("train", self, **least)
        for name in ("lr", "encoder_lr", "projector_lr"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise ValueError(f"train.{name} is {rate}, it must be above 0; freeze keeps a part as it is")
        for name in ("epochs", "lora_alpha"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}, it must be above 0")
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"train.global_batch_size is {self.global_batch_size} and train.gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: keep one of them, the first decides the second"
            )
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_dropout):
            raise ValueError("train.lora_alpha or train.lora_dropout is given without train.lora_rank: give it too")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"train.lora_dropout is {self.lora_dropout}, it must be 0 or more and below 1")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio is {self.warmup_ratio}, it must be 0 or more and below 1")

    def settled(self, samples: int, processes: int = 1) -> TrainConfig:
        """The same with `steps` and `gradient_accumulation_steps` as they follow from the number of `samples` of the
        stage and of `processes`; epochs and global batch size are then spent.

        Raises ValueError where the global batch size is no multiple of a micro-batch of all processes.
        """
        micro_batch = self.batch_size * processes
        accumulation = self.gradient_accumulation_steps
        if self.global_batch_size:
            if self.global_batch_size % micro_batch:
                raise ValueError(
                    f"train.global_batch_size is {self.global_batch_size} but {processes} processes of "
                    f"train.batch_size {self.batch_size} make {micro_batch} samples at once: choose a batch size that "
                    "divides it"
                )
            accumulation = self.global_batch_size // micro_batch
        an_epoch = math.ceil(math.ceil(samples / micro_batch) / accumulation)  # each begins a step of its own
        steps = self.steps or max(1, math.ceil(self.epochs * an_epoch))
        return replace(self, steps=steps, gradient_accumulation_steps=accumulation, global_batch_size=None)


@dataclass(frozen=True)
class StageConfig:
    """A stage of training before the last one; its student is where the next stage starts."""

    data: DataConfig
    """What this stage trains on; its test part is not used."""
    train: TrainConfig
    """Optimisation of this stage."""
    freeze: tuple[Part, ...] = ()
    """Parts that this stage does not train: vision_tower, projector, language_model."""
    method: MethodConfig | None = None
    """How this stage learns from the teacher; null: cross entropy alone."""

    def without_test(self) -> StageConfig:
        """The same without a test part: only the last stage's student is judged."""
        return replace(self, data=replace(self.data, test_split=None))


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
    method: MethodConfig = field(default_factory=MethodConfig)
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


def load_config(argv: Sequence[str] | None = None, *, prog: str | None = None) -> RunConfig:
    """The configuration that command line arguments name (`sys.argv[1:]` by default).

    `--config FILE.yaml` reads a file, `--section.field value` sets one field; the later one wins. `--help`
    lists the fields; a bare `--tiny` or `--resume` is true. What is wrong (an unknown key, another type, a missing
    file) is one line on stderr, exit status 2.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file of the fields below.")
    parser.add_class_arguments(RunConfig)
    try:
        values = parser.parse_args(_with_bare_flags(sys.argv[1:] if argv is None else list(argv)))
        del values["config"]
        for part in fields(RunConfig):
            if is_dataclass(part.default_factory) and not isinstance(values[part.name], Namespace):
                raise ValueError(f"{part.name} is {values[part.name]}, it must be a group of fields")
        return RunConfig(**vars(parser.instantiate(values)))
    except (ArgumentError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())} (--help lists the fields)", file=sys.stderr)
        raise SystemExit(2) from None


def _with_bare_flags(argv: list[str]) -> list[str]:
    """`--tiny` and `--resume` without a value are given "true"."""
    whole = []
    for here, after in itertools.zip_longest(argv, argv[1:]):
        bare = here in ("--tiny", "--resume") and (after is None or after.startswith("--"))
        whole += [here, "true"] if bare else [here]
    return whole


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write `config` as the YAML file that `load_config(["--config", path])` reads back to an equal one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))


def weight_fields(config: RunConfig) -> dict[str, Any]:
    """The fields that decide a run's weights, by dotted name: all but names, places, judging and what is kept."""
    free = (".root", ".made_by", "data.in_memory", "train.data_workers", "train.keep_checkpoints")
    free += ("train.logging_steps", "train.checkpoint_every")
    flat: dict[str, Any] = {"seed": config.seed}
    for part in ("pretrain", "sft", "data", "teacher", "student", "method", "train"):
        flat |= _flat(part, getattr(config, part))
    return {name: item for name, item in flat.items() if not name.endswith(free)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, tuple) and any(is_dataclass(each) for each in value):
        parts = (_flat(f"{name}.{place}", each) for place, each in enumerate(value))
        return {key: item for part in parts for key, item in part.items()}
    if not is_dataclass(value):
        return {name: value}
    parts = (_flat(f"{name}.{each.name}", getattr(value, each.name)) for each in fields(value))
    return {key: item for part in parts for key, item in part.items()}


def filled_in(path: str, field: str) -> Path:
    """`path` with its $VARIABLES; ValueError naming `field` where one of them is not set."""
    whole = os.path.expandvars(path)
    if "$" in whole:
        raise ValueError(f"{field} is {path} and that variable is not set: set it, or give --{field}")
    return Path(whole)


def _at_least(section: str, config: Any, **least: float) -> None:
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{section}.{name} is {value}, it must be {smallest} or more")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
