"""A third task through the same engine: a classifier with two frozen teachers, whose loss is a mean over pictures.

`python test_toy_task.py '{"out": "folder"}'` trains it in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from toy_run import KillAfter, StopAfter, weights_hash
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, set_seed

from switchkd import Terms
from switchkd.training import DistillTrainer, latest_checkpoint, training_arguments
from switchkd.training.config import TrainConfig

CLASSES = 4


def classifier(width: int) -> ResNetForImageClassification:
    sizes = {"embedding_size": width, "hidden_sizes": [width], "depths": [1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))


class FusedTeachers(nn.Module):
    """Cross entropy, and KL from the mean of two teachers' answers."""

    frozen = ("first", "second")

    def __init__(self):
        super().__init__()
        self.student = classifier(8)
        self.first, self.second = (classifier(width).requires_grad_(False) for width in (8, 12))
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def progress(self, fraction):
        pass

    def count(self, batch):
        return len(batch["pixel_values"])

    def forward(self, pixel_values, classes, num_items_in_batch=None):
        count = len(pixel_values) if num_items_in_batch is None else num_items_in_batch
        student = self.student(pixel_values).logits.log_softmax(-1)
        with torch.no_grad():
            teacher = sum(model(pixel_values).logits.softmax(-1) for model in (self.first, self.second)) / 2
        sums = {
            "ce": F.nll_loss(student, classes, reduction="sum"),
            "kl": F.kl_div(student, teacher, reduction="sum"),
        }
        return Terms.of({name: total / count for name, total in sums.items()}, {"ce": 1.0, "kl": 0.5})


def pictures(count: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=random), "classes": torch.tensor(place % CLASSES)}
        for place in range(count)
    ]


def collate(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def trainer_of(folder, callbacks=(), **settings) -> DistillTrainer:
    set_seed(0)
    config = TrainConfig(
        **{"steps": 6, "batch_size": 3, "checkpoint_every": 2, "lr": 1e-2, "logging_steps": 1, **settings}
    )
    args = training_arguments(config, folder, disable_tqdm=True)
    return DistillTrainer(
        FusedTeachers(),
        args,
        pictures(10),
        pictures(7),
        data_collator=collate,
        part_rates={"head": 1e-3},
        parts={"body": ("student.resnet",), "head": ("student.classifier",)},
        keep_best=settings.get("keep_best"),
        callbacks=list(callbacks),
    )


def no_teacher(names) -> bool:
    return not [name for name in names if name.startswith(("first.", "second."))]


# ---- In this process


def test_pictures_are_what_is_counted(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, optimizer="sgd", steps=1)
    batches = [collate(pictures(count)) for count in (3, 2)]
    assert trainer._get_num_items_in_batch(batches, "cpu") == 5
    trainer.train()
    measured = trainer.evaluate()
    method, whole = trainer.method.eval(), collate(pictures(7))
    with torch.no_grad():
        terms = method(**whole)
    assert measured["eval_ce"] == pytest.approx(float(terms.named["ce"]), rel=1e-5)
    assert measured["eval_loss"] == pytest.approx(float(terms.loss), rel=1e-5)


def test_teachers_learn_nothing_their_statistics_included(tmp_path):
    trainer = trainer_of(tmp_path)
    before = [weights_hash(model) for model in (trainer.method.first, trainer.method.second)]
    student = weights_hash(trainer.method.student)
    trainer.train()
    assert [weights_hash(model) for model in (trainer.method.first, trainer.method.second)] == before
    assert weights_hash(trainer.method.student) != student
    trainer.export_student(tmp_path / "student")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert weights_hash(loaded) == weights_hash(trainer.method.student)


# ---- Killed and resumed


def run(**settings) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, json.dumps(settings, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


@pytest.fixture
def _one_thread():
    """As the started processes have: sums, and so weights, differ with the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_killed_run_goes_on_bit_for_bit_and_no_teacher_is_in_its_checkpoint(tmp_path):
    whole = trainer_of(tmp_path / "whole", gradient_accumulation_steps=2)
    whole.train()
    assert run(out=tmp_path / "killed", kill_after=5) == -signal.SIGKILL
    checkpoint = latest_checkpoint(tmp_path / "killed")
    assert checkpoint.name == "checkpoint-4"
    state = load_file(checkpoint / "method.safetensors")
    assert no_teacher(state)
    assert state.keys() == {name for name in whole.method.state_dict() if name.startswith("student.")}
    smaller = sum(tensor.numel() for tensor in whole.method.state_dict().values())
    held = sum(tensor.numel() for tensor in state.values())
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = sum(value.numel() for each in optimizer["state"].values() for value in each.values())
    assert moments < 3 * held < 3 * smaller
    assert run(out=tmp_path / "killed") == 0
    ended = load_file(latest_checkpoint(tmp_path / "killed") / "method.safetensors")
    for name, tensor in whole.method.student.state_dict().items():
        assert torch.equal(ended[f"student.{name}"], tensor), name


def test_a_run_with_the_best_checkpoint_goes_on_too(tmp_path):
    settings = {"eval_every": 1, "gradient_accumulation_steps": 2, "keep_best": "eval_kl"}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    trainer_of(tmp_path / "cut", [StopAfter(3)], **settings).train()
    resumed = trainer_of(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert weights_hash(resumed.method) == weights_hash(whole.method)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    kill = [KillAfter(given["kill_after"])] if "kill_after" in given else []
    trainer_of(given["out"], kill, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)
