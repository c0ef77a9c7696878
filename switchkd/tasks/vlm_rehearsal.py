"""Rehearsal of a run: its own stages and settings on tiny random parts of the same kinds and a dozen samples.

What a configuration would do on a cluster is done here in a minute on any machine, without the network: the same
classes, tokenizer family, freezing, LoRA, accumulation, checkpoints and exports. Its results mean nothing.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    PreTrainedConfig,
)

from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.data.conversations.sample_llava import CAPTIONS, INSTRUCTIONS, write_llava_sample
from switchkd.evaluation.config import JudgeConfig
from switchkd.models import assemble_llava
from switchkd.models.planned import planned_part, student_config, teacher_config
from switchkd.models.tiny import tiny_llama_tokenizer, tiny_tokenizer
from switchkd.models.towers import tower_kind
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.config import TrainConfig

SAMPLES = 12
SIDE, PATCH = 32, 8  # pictures of 16 visual tokens
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
STUDENT_WIDTH, TEACHER_WIDTH = 32, 48


def rehearse(config: Run) -> Run:
    """The configuration `NAME-tiny` of the rehearsal; its parts and samples are written to `out/.NAME-tiny`.

    Random weights follow the part's shape, so that a tower that student and teacher share is shared here too. A second
    call writes the same parts and gives an equal configuration: a rehearsal resumes as its run would. Only LLaVA data
    and mixtures are replaced by samples of the package; of other sources a dozen is taken at random. Of several
    processes the first writes. Raises ValueError where the teacher would become tiny and the student's tower not, and
    as `planned_part` and `teacher_config` do, where the kind of a part cannot be found out.
    """
    student = config.student
    if config.teacher.path and not (student.path or student.vision_tower):
        raise ValueError(
            f"teacher.path is {config.teacher.path} and student.vision_tower is left out: a rehearsal makes the "
            "teacher tiny, and the package's own tower then sees other pictures; name the student's tower too"
        )
    folder = Path(config.out) / f".{config.name}-tiny"
    state = PartialState()
    with state.main_process_first():
        if state.is_main_process:
            write_llava_sample(folder / "data")
            _write_parts(config, folder)
    made = folder / "data"
    stages = config.stages()
    names = ("pretrain", "sft", "distil")
    sections: dict[str, Any] = {name: _tiny_stage(getattr(config, name), made) for name in names}
    if any("data" not in stage.own for stage in stages):
        sections["data"] = _tiny_data(config.data, made)
    if any("train" not in stage.own for stage in stages):
        sections["train"] = _tiny_train(config.train)
    teacher = replace(config.teacher, steps=min(config.teacher.steps, 2))
    if teacher.path:
        teacher = replace(teacher, path=str(folder / "teacher"), made_by=None)
    if student.path:
        student = replace(student, path=str(folder / "student"))
    if student.vision_tower:
        student = replace(student, vision_tower=str(folder / "vision_tower"), image_processor=None)
    if student.language_model:
        student = replace(student, language_model=str(folder / "language_model"))
    return replace(
        config,
        name=f"{config.name}-tiny",
        tiny=False,
        teacher=teacher,
        student=student,
        **sections,
        judge=JudgeConfig(batch_size=4, max_new_tokens=8),
    )


def _write_parts(config: Run, folder: Path) -> None:
    """Every part that the configuration names, as a tiny one of its kind."""
    teacher, student = config.teacher, config.student
    if teacher.path:
        template = teacher.chat_template or student.chat_template
        _write_llava(teacher_config(teacher), TEACHER_WIDTH, template, folder / "teacher")
    if student.path:
        _write_llava(student_config(student), STUDENT_WIDTH, student.chat_template, folder / "student")
    if student.vision_tower:
        tower = _tower(planned_part(student.vision_tower))
        tower.save_pretrained(folder / "vision_tower")
        tower_kind(tower.config).own_image_processor(SIDE).save_pretrained(folder / "vision_tower")
    if student.language_model:
        model, tokenizer = _language_model(planned_part(student.language_model), STUDENT_WIDTH)
        model.save_pretrained(folder / "language_model")
        tokenizer.save_pretrained(folder / "language_model")


def _write_llava(shape: LlavaConfig, width: int, chat_template: str | None, folder: Path) -> None:
    model, tokenizer = _language_model(shape.text_config, width)
    tower = _tower(shape.vision_config)
    model, processor = assemble_llava(
        tower,
        model,
        tokenizer,
        vision_feature_layer=shape.vision_feature_layer,
        vision_feature_select_strategy=shape.vision_feature_select_strategy,
        chat_template=chat_template,
        image_processor=tower_kind(tower.config).own_image_processor(SIDE),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tower(shape: PreTrainedConfig):
    """A random tower of the shape's kind; the same weights for the same shape."""
    torch.manual_seed(_seed(shape))
    tiny = type(shape)(**TOWER, image_size=SIDE, patch_size=PATCH)
    return tower_kind(tiny).model(tiny)


def _language_model(shape: PreTrainedConfig, width: int) -> tuple:
    """A random language model of the shape's kind and its tokenizer. Rows past the tokenizer's are kept modulo 256,
    so that 151,936 and 152,064 still differ."""
    tokenizer = tiny_llama_tokenizer() if shape.model_type == "llama" else tiny_tokenizer()
    torch.manual_seed(_seed(shape))
    tiny = type(shape)(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        vocab_size=len(tokenizer) + shape.vocab_size % 256,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(tiny), tokenizer


def _seed(shape: PreTrainedConfig) -> int:
    return zlib.crc32(f"{shape.model_type} {shape.hidden_size} {shape.num_hidden_layers}".encode())


def _tiny_stage(stage: StageConfig | None, folder: Path) -> StageConfig | None:
    if stage is None:
        return None
    data, train = stage.data and _tiny_data(stage.data, folder), stage.train and _tiny_train(stage.train)
    return replace(stage, data=data, train=train)


def _tiny_data(data: DataConfig, folder: Path) -> DataConfig:
    mixture = (MixtureConfig("llava", *_sample(each.split, folder), min(each.weight, 1.0)) for each in data.mixture)
    # Boxes of the mixture go with it, and the fields that read them.
    boxes = {"voc": {}, "steel": {"first_pixel": 1}}.get(data.source, {"first_pixel": 1, "kinds": DataConfig.kinds})
    data = replace(data, train_images=SAMPLES, test_images=SAMPLES, mixture=tuple(mixture), **boxes)
    if data.source != "llava":
        return data
    root, train_split = _sample(data.train_split, folder)
    test_split = data.test_split and _sample(data.test_split, folder)[1]
    return replace(data, root=root, train_split=train_split, test_split=test_split)


def _sample(name: str, folder: Path) -> tuple[str, str]:
    """Root and file of the samples that stand for the file `name`: captions where it looks like LLaVA's pretraining."""
    captions = any(word in Path(name).name.lower() for word in ("558k", "lcs", "pretrain", "caption"))
    root, file = (folder / "images", CAPTIONS) if captions else (folder, INSTRUCTIONS)
    return str(root), str(folder / file)


def _tiny_train(train: TrainConfig) -> TrainConfig:
    accumulates = train.global_batch_size or train.gradient_accumulation_steps > 1
    return replace(
        train,
        steps=train.steps and min(train.steps, 3),
        batch_size=2,
        gradient_accumulation_steps=2 if accumulates else 1,
        global_batch_size=None,
        lora_rank=train.lora_rank and min(train.lora_rank, 4),
        lora_alpha=None,
        logging_steps=1,
        eval_every=min(train.eval_every, 1),
        eval_samples=2 if train.eval_every else None,
        checkpoint_every=1,
        data_workers=0,
    )
