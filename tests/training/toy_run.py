"""A toy method, toy data, and a run of them: imported by the tests, and started by them as a process.

`python toy_run.py '{"out": "folder", "steps": 8}'` trains and writes `folder/student`; with `"stages": 2` it then does
the same again in `folder/2`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    TrainerCallback,
    set_seed,
)

from switchkd.methods.terms import Terms
from switchkd.training import DistillTrainer, Interrupted, process_state, training_arguments
from switchkd.training.config import TrainConfig

IMAGE_TOKEN, VOCAB = 3, 40


def toy_llava(hidden: int = 16, dropout: float = 0.1) -> LlavaForConditionalGeneration:
    """About 7 thousand parameters, four visual tokens an image, tied embeddings."""
    dims = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Qwen2Config(
        **dims,
        vocab_size=VOCAB,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(**dims, image_size=8, patch_size=4, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # unused: LLaVA reads the layer before it
    return model


class ToyMethod(nn.Module):
    """Cross entropy and KL to a frozen teacher, with a module and a buffer of its own."""

    frozen = ("teacher",)

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.student, self.teacher = toy_llava(16, dropout), toy_llava(24).requires_grad_(False)
        self.temperature = nn.Linear(1, 1)
        self.register_buffer("fraction", torch.zeros(()))
        self.fractions: list[float] = []

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    def count(self, batch) -> torch.Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def progress(self, fraction: float) -> None:
        self.fraction.fill_(fraction)
        self.fractions.append(fraction)

    def forward(self, input_ids, attention_mask, pixel_values, labels, num_items_in_batch=None) -> Terms:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        answer, targets = labels[:, 1:] != -100, labels[:, 1:]
        student = self.student(**batch, use_cache=False).logits[:, :-1][answer].float()
        with torch.no_grad():
            teacher = self.teacher(**batch, use_cache=False).logits[:, :-1][answer].float()
        count = answer.sum() if num_items_in_batch is None else num_items_in_batch
        ce = F.cross_entropy(student, targets[answer], reduction="sum") / count
        student = F.log_softmax(student / self.temperature(student.new_ones(1)).exp(), -1)
        align = F.kl_div(student, F.log_softmax(teacher, -1), reduction="sum", log_target=True) / count
        return Terms.of({"ce": ce, "align": align}, {"ce": 1.0, "align": 0.5})


class ToyData(torch.utils.data.Dataset):
    """Samples with one image and one to six answer tokens, each made from its index."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def lengths(self) -> list[int]:
        return [len(self[index]["input_ids"]) for index in range(self.count)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.count:
            raise IndexError(index)
        random = torch.Generator().manual_seed(index)
        answer = torch.randint(4, VOCAB, (1 + index * 5 % 6,), generator=random)
        question = torch.tensor([1] + 4 * [IMAGE_TOKEN] + [4 + index % 5])
        return {
            "input_ids": torch.cat([question, answer]),
            "labels": torch.cat([torch.full_like(question, -100), answer]),
            "pixel_values": torch.randn(1, 3, 8, 8, generator=random),
        }


def toy_collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int):
        return nn.utils.rnn.pad_sequence([s[name] for s in samples], True, value)

    ids = pad("input_ids", 0)
    pixels = torch.cat([s["pixel_values"] for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": pad("labels", -100),
        "pixel_values": pixels,
    }


def toy_trainer(out, *, samples=12, callbacks=(), trainer=DistillTrainer, dropout=0.1, **settings):
    """A trainer of the toy method; each of `settings` goes to TrainConfig, the trainer or the arguments."""
    set_seed(0)
    method = ToyMethod(dropout)
    config = {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "logging_steps": 1, "lr": 1e-2}
    config |= {name: settings.pop(name) for name in list(settings) if name in TrainConfig.__dataclass_fields__}
    names = ("part_rates", "run_config", "processing_class", "log_file", "log_fields", "eval_dataset", "parts")
    to_trainer = {name: settings.pop(name) for name in names if name in settings}
    to_trainer |= {name: config[name] for name in ("group_by_length", "keep_best") if name in config}
    args = training_arguments(TrainConfig(**config), out, **{"disable_tqdm": True, **settings})
    return trainer(method, args, ToyData(samples), data_collator=toy_collate, callbacks=list(callbacks), **to_trainer)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class StopAfter(TrainerCallback):
    """Training ends after a step, as if it had been the last."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Crash(TrainerCallback):
    """KeyboardInterrupt after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def broken_run(folder, **settings):
    """Six steps over seven samples, two an epoch, stopped after step 5: the newest checkpoint is of step 4."""
    trainer = toy_trainer(folder, samples=7, gradient_accumulation_steps=2, callbacks=[Crash(5)], **settings)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 5
    return trainer


def resumed_run(folder, checkpoint=True, **settings):
    """The same run to its end."""
    trainer = toy_trainer(folder, samples=7, gradient_accumulation_steps=2, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


class KillAfter(TrainerCallback):
    """SIGKILL to this process after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalAfter(TrainerCallback):
    """A signal to this process, or to all of its group, while it takes the step after `step`."""

    def __init__(self, step: int, number: int = signal.SIGINT, *, group: bool = False, times: int = 1):
        self.step, self.number, self.group, self.times = step, number, group, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                (os.killpg if self.group else os.kill)(os.getpgrp() if self.group else os.getpid(), self.number)


def main(settings: dict) -> None:
    out, resume = Path(settings.pop("out")), settings.pop("resume", False)
    stages = settings.pop("stages", 1)
    state = process_state()
    stage = settings.pop("zero", None)
    expect_zero = settings.pop("expect_zero", bool(stage))
    if stage:
        settings["deepspeed"] = {
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
    if kill := settings.pop("kill_after", None):
        settings["callbacks"] = [KillAfter(kill)]
    if stop := settings.pop("signal_after", None):
        step, rank = stop
        if rank in (state.process_index, "group"):
            settings["callbacks"] = [SignalAfter(step, group=rank == "group")]
    if kill := settings.pop("kill_in_save", None):
        saved = DistillTrainer._save_optimizer_and_scheduler

        def die(self, output_dir):
            saved(self, output_dir)
            if self.state.global_step == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        DistillTrainer._save_optimizer_and_scheduler = die
    if evaluated := settings.pop("evaluate", None):
        settings["eval_dataset"] = ToyData(evaluated)
    ranks = state.num_processes
    measured = []
    for folder in [out, *(out / str(stage) for stage in range(2, stages + 1))]:
        trainer = toy_trainer(folder, **settings)
        assert trainer.is_deepspeed_enabled == expect_zero
        assert trainer.args.world_size == ranks == state.num_processes
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Interrupted as stop:
            (out / f"interrupted-{state.process_index}").write_text(str(stop.step))
            break
        trainer.export_student(folder / "student")
        measured.append(trainer.evaluate() if evaluated else {})
    if state.is_main_process:
        (out / "world.json").write_text(json.dumps({"ranks": ranks, "measured": measured}))
    PartialState().destroy_process_group()  # threads of gloo that outlive the interpreter can abort it


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
