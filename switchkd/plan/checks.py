"""What would go wrong with a run: each check adds its problems to the plan's list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import LlavaConfig, LlavaProcessor

from switchkd.config import Stage
from switchkd.models import same_inputs, shared_vocab
from switchkd.models.pair import teacher_processor
from switchkd.plan.gpus import Gpu
from switchkd.tasks import load_config
from switchkd.tasks.vlm_config import Run

if TYPE_CHECKING:
    from switchkd.plan.planner import StagePlan

TIGHT = 0.92  # of a GPU's memory: above it, gaps between blocks can end the run


@dataclass(frozen=True)
class Problem:
    """What would go wrong. field: of the configuration. stops: it would end the run; else it is worth knowing."""

    field: str
    text: str
    stops: bool = True


def check_tokenizers(
    config: Run,
    student: LlavaConfig,
    teacher: LlavaConfig,
    processor: LlavaProcessor | None,
    problems: list[Problem],
    assumed: list[str],
) -> int:
    """The vocabulary rows that student and teacher share, and whether both read one encoding.

    Where a tokenizer is not on this disk, all rows that can be shared are taken to be, and `assumed` says so.
    """
    rows = min(student.text_config.vocab_size, teacher.text_config.vocab_size)
    image_rows = {student.image_token_id, teacher.image_token_id}
    most = rows if len(image_rows) == 1 else min(rows, *image_rows)
    other = teacher_processor(config.teacher, local_files_only=True)
    if processor is None or other is None:
        name = config.student.path or config.student.language_model if processor is None else config.teacher.path
        assumed.append(
            f"vocabularies not checked: the tokenizer of {name} is not on this disk; the student's "
            f"head has {student.text_config.vocab_size:,} rows, the teacher's {teacher.text_config.vocab_size:,}"
        )
        return most
    try:
        shared = shared_vocab(processor.tokenizer, other.tokenizer)
    except ValueError as error:
        problems.append(Problem("teacher.path", str(error)))
        return most
    try:
        if config.student.path or config.student.chat_template or not config.teacher.path:
            same_inputs(processor, other)
    except ValueError as error:
        problems.append(Problem("student.chat_template", str(error)))
    return shared


def same_towers(config: Run, stage: str, student: LlavaConfig, teacher: LlavaConfig | None) -> bool | None:
    """Whether student and teacher have equal vision towers when `stage` starts; None where nothing says so."""
    if teacher is None or config.teacher.steps or _moved(config, stage):
        return False
    if config.student.path or not config.teacher.path:
        return bool(config.student.path) and config.student.path == config.teacher.path
    if config.teacher.made_by and not Path(config.teacher.path).exists():
        recipe = load_config(["--config", config.teacher.made_by])
        frozen = all("vision_tower" in each.freeze for each in recipe.stages())
        return frozen and recipe.student.vision_tower == config.student.vision_tower
    shapes = [shape.vision_config for shape in (student, teacher)]
    alike = all(
        getattr(shapes[0], name) == getattr(shapes[1], name)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
    )
    return None if alike else False


def _moved(config: Run, stage: str) -> bool:
    names = [each.name for each in config.stages()]
    before = "undistilled" if stage == "distil" and "undistilled" in names else stage
    earlier = [each for each in config.stages()[: names.index(before)] if each.name != "teacher"]
    return any("vision_tower" not in each.freeze for each in earlier)


def check_towers(equal: bool | None, field: str, problems: list[Problem]) -> None:
    """Of a pair that can be switched."""
    if equal is not False:
        begins = "the switch term begins at zero and acts once the student's tower moves"
        text = f"student and teacher start from equal vision towers: {begins}"
        if equal is None:
            text = f"the two vision towers have one shape; if their weights are equal too, {begins}"
        problems.append(Problem(f"{field}.switch", text, stops=False))


def check_steps(stage: Stage, samples: int | None, gpus: int, problems: list[Problem]) -> tuple[int | None, int]:
    """Steps of a stage, None where they are unknown, and the micro-batches of each."""
    train, field = stage.train, stage.field("train")
    try:
        settled = train.settled(samples or 1, gpus)
    except ValueError as error:
        problems.append(Problem(f"{field}.global_batch_size", str(error)))
        accumulation = math.ceil(train.global_batch_size / (train.batch_size * gpus))
        per_step = accumulation * train.batch_size * gpus
        return train.steps or (samples and math.ceil(train.epochs * samples / per_step)), accumulation
    if train.steps is None and samples is None:
        problems.append(
            Problem(
                f"{field}.steps",
                f"is not given and the number of samples is unknown: give {field}.steps to see times",
                stops=False,
            )
        )
        return None, settled.gradient_accumulation_steps
    return settled.steps, settled.gradient_accumulation_steps


def check_room(stage: StagePlan, visual_tokens: int, problems: list[Problem]) -> bool:
    """Whether the samples hold an image and an answer."""
    if stage.survey.longest < visual_tokens + 2:
        problems.append(
            Problem(
                f"{stage.config.field('data')}.max_length",
                f"{stage.config.data.max_length} cuts the {visual_tokens} tokens of an image: make it that and the "
                "longest text, or leave it out",
            )
        )
        return False
    return True


def check_memory(
    memory: dict[str, int], stage: StagePlan, gpu: Gpu, gpus: int, engine: str, problems: list[Problem]
) -> None:
    """Whether the longest batch fits, and what would make it fit."""
    need = sum(memory.values())
    if need <= TIGHT * gpu.memory:
        return
    train, method = stage.config.train, stage.config.method
    grows = sum(size for name, size in memory.items() if name.startswith("activations"))
    most = int((TIGHT * gpu.memory - need + grows) / grows * train.batch_size)
    total = train.global_batch_size
    fitting = [size for size in range(1, most + 1) if total is None or total % (size * gpus) == 0]
    ways = [f"train.batch_size {fitting[-1]}"] if fitting else []
    ways += ["train.gradient_checkpointing true"] * (not train.gradient_checkpointing)
    if method and method.switch and not method.gradient_checkpointing:
        ways.append("method.gradient_checkpointing true")
    ways += ["--engine zero2"] * (engine == "ddp" and gpus > 1)
    ways += ["a lower data.max_length"]
    sure = need > gpu.memory
    problems.append(
        Problem(
            f"{stage.config.field('train')}.batch_size",
            f"{train.batch_size} {'needs' if sure else 'may be too large, it takes'} {need / 2**30:.0f} GiB in the "
            f"longest batch ({stage.survey.longest:,} tokens a sample) and one {gpu.name} has {gpu.gibibytes:.0f}: set "
            f"{', or '.join(ways)}",
            stops=sure,
        )
    )


def check_run(config: Run, stages: int, engine: str, problems: list[Problem]) -> None:
    """What concerns the run as a whole."""
    if engine == "zero3" and stages > 1:
        problems.append(
            Problem("--engine", f"zero3 trains one stage, this run has {stages}: take zero2, or make each stage a run")
        )
    if not config.last.train.bf16:
        problems.append(
            Problem(
                f"{config.last.field('train')}.bf16",
                "is false, but times here are those of bfloat16 arithmetic: float32 is several times slower",
                stops=False,
            )
        )
