"""Makes the weights that the package ships: a tiny pretrained vision tower and the tiny teacher trained on it.

    python recipes/make_tiny.py --out weights          two CPU cores, about half an hour; the same seed, the same data

Real users start from pretrained parts; offline ones start from these. A vision transformer of this size learns nothing
from questions and answers alone in its first thousand steps, so it is pretrained as a rendered world allows: for every
patch, which kinds of defect it shows and the corners of the box it lies in. The tower that ships, the one that students
start from, is kept early in this pretraining; the teacher goes on from its end and is trained by the package's own
trainer on the questions of `switchkd.data.to_conversations`: like a student with a general encoder beside a teacher
whose encoder knows the domain. Pictures come from seeds that no other part uses.
Writes OUT/vision_tower, OUT/teacher (float16) and OUT/log.json with the scores on held-out pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import SiglipVisionModel, set_seed
from transformers.utils import logging as transformers_logging

from switchkd import SupervisedMethod
from switchkd.data import Collator, ConversationDataset, DefectImage, join_turns, to_conversations
from switchkd.data.steel import CLASSES, render_steel
from switchkd.evaluation import generate_answers, score_answers
from switchkd.models import freeze, load_llava
from switchkd.models.tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    TEACHER_SHAPE,
    random_llava,
    tiny_processor,
    tiny_vision_config,
)
from switchkd.training import DistillTrainer, training_arguments
from switchkd.training.config import TrainConfig
from switchkd.training.memory import keep_freed_memory

TRAIN_SEED, TEST_SEED = 2, 3  # of the pictures; data.sources uses 10 * image_seed + 0 and + 1
SIDE = IMAGE_SIZE // PATCH_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; the package's is switchkd/models/weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000, help="pictures to train on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--tower-steps", type=int, default=2_500)
    parser.add_argument("--shipped-tower-step", type=int, default=600, help="step at which the shipped tower is kept")
    parser.add_argument("--teacher-steps", type=int, default=1_500)
    parser.add_argument("--test-images", type=int, default=600, help="pictures to judge on, four questions each")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    if not 0 < options.shipped_tower_step < options.tower_steps:
        parser.error(
            f"--shipped-tower-step is {options.shipped_tower_step} and --tower-steps {options.tower_steps}: keep the "
            "tower before the last step"
        )
    started = time.perf_counter()
    train = render_steel(options.images, TRAIN_SEED)
    test = render_steel(options.test_images, TEST_SEED)
    log = {"commit": commit(), "machine": machine(), **{k: v for k, v in vars(options).items() if k != "out"}}

    shipped, tower, log["towers"] = pretrain_tower(
        train, test, options.tower_steps, options.shipped_tower_step, options.seed
    )
    shipped.half().save_pretrained(options.out / "vision_tower")
    log["teacher"] = train_teacher(tower, train, test, options)
    log["seconds"] = round(time.perf_counter() - started)
    (options.out / "log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log, indent=2))


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not a git checkout"


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}"


# ---- The vision tower


def pretrain_tower(
    train: list[DefectImage],
    test: list[DefectImage],
    steps: int,
    kept_step: int,
    seed: int,
    batch: int = 64,
    lr: float = 2e-3,
) -> tuple[SiglipVisionModel, SiglipVisionModel, dict]:
    """Dense pretraining: for each patch its kinds of defect (binary cross entropy) and its defect's box (L1).

    Returns the tower after `kept_step` steps, the tower after all of them, and the scores of both.
    """
    set_seed(seed)
    tower = SiglipVisionModel(tiny_vision_config())
    reader = nn.Linear(tower.config.hidden_size, len(CLASSES) + 4)
    parameters = [*tower.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    pixels, labels = dense_labels(train)
    bar = tqdm(range(steps), desc="vision tower", unit="step")
    scores = {}
    for step in bar:
        if step == kept_step:
            kept = copy.deepcopy(tower)
            scores["shipped"] = {"steps": step, **judge_tower(kept, reader, test)}
        picked = torch.randint(len(pixels), (batch,))
        kinds, boxes = read_patches(tower, reader, pixels[picked])
        loss = F.binary_cross_entropy_with_logits(kinds, labels["kinds"][picked])
        box_error = (boxes - labels["boxes"][picked]).abs().mean(-1)[labels["inside"][picked]].mean()
        optimizer.zero_grad()
        (loss + 2 * box_error).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(kinds=f"{loss.item():.3f}", boxes=f"{box_error.item():.3f}")

    scores["teacher's before its training"] = {"steps": steps, **judge_tower(tower, reader, test)}
    return kept, tower, scores


@torch.no_grad()
def judge_tower(tower: SiglipVisionModel, reader: nn.Linear, test: list[DefectImage]) -> dict[str, float]:
    """F1 of (patch, kind) pairs and mean error of box sides, in image sides, on held-out pictures."""
    pixels, labels = dense_labels(test)
    kinds, boxes = read_patches(tower, reader, pixels)
    hits = ((kinds > 0) & (labels["kinds"] > 0)).sum()
    f1 = 2 * hits / ((kinds > 0).sum() + labels["kinds"].sum())
    error = (boxes - labels["boxes"]).abs().mean(-1)[labels["inside"]].mean()
    return {"patch_f1": round(f1.item(), 4), "box_error": round(error.item(), 4)}


def read_patches(tower: nn.Module, reader: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Grey bytes [N, H, W] -> logits of kinds [N, patches, kinds], boxes [N, patches, 4] in image sides."""
    normalised = (pixels.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
    features = tower(normalised, output_hidden_states=True).hidden_states[-1]
    return reader(features).split([len(CLASSES), 4], dim=-1)


def dense_labels(images: list[DefectImage]) -> tuple[Tensor, dict[str, Tensor]]:
    """Grey bytes [N, H, W] and for each patch: the kinds that cover over a tenth of it, the box it lies deepest in."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.image)[:, :, 0] for image in images]))
    kinds = torch.zeros(len(images), SIDE * SIDE, len(CLASSES))
    boxes = torch.zeros(len(images), SIDE * SIDE, 4)
    inside = torch.zeros(len(images), SIDE * SIDE, dtype=torch.bool)
    start = torch.arange(SIDE) * PATCH_SIZE
    for index, image in enumerate(images):
        deepest = torch.zeros(SIDE * SIDE)
        for box, label in zip(image.boxes, image.labels, strict=True):
            x1, y1, x2, y2 = box
            across = ((start + PATCH_SIZE).clamp(max=x2) - start.clamp(min=x1)).clamp(min=0)
            down = ((start + PATCH_SIZE).clamp(max=y2) - start.clamp(min=y1)).clamp(min=0)
            area = (down[:, None] * across[None, :]).flatten()
            covered = area > 0.1 * min(PATCH_SIZE**2, (x2 - x1) * (y2 - y1))
            kinds[index, covered, CLASSES.index(label)] = 1
            deeper = covered & (area > deepest)
            boxes[index, deeper] = torch.tensor(box) / IMAGE_SIZE
            deepest = torch.where(deeper, area, deepest)
            inside[index] |= covered
    return pixels, {"kinds": kinds, "boxes": boxes, "inside": inside}


# ---- The teacher


def train_teacher(
    tower: SiglipVisionModel, train: list[DefectImage], test: list[DefectImage], options: argparse.Namespace
) -> dict:
    """Trains the teacher on joined questions, writes OUT/teacher in float16 and judges what was written."""
    set_seed(options.seed)
    processor = tiny_processor()
    teacher = random_llava(processor.tokenizer, **TEACHER_SHAPE)
    teacher.model.vision_tower.load_state_dict(tower.state_dict())
    freeze(teacher)
    conversations = join_turns(to_conversations(train, CLASSES, options.seed), shuffle_seed=options.seed)
    dataset = ConversationDataset(conversations, processor)
    samples = [dataset[index] for index in tqdm(range(len(dataset)), desc="encoding", unit="sample")]
    settings = TrainConfig(
        steps=options.teacher_steps, batch_size=32, lr=2e-3, warmup_ratio=0.05, weight_decay=0.05,
        logging_steps=100, checkpoint_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillTrainer(
            SupervisedMethod(teacher),
            training_arguments(settings, folder, seed=options.seed),
            train_dataset=samples,
            processing_class=processor,
            data_collator=Collator(processor.tokenizer.pad_token_id),
            part_rates={"student.model.vision_tower": 4e-4},
        )
        trainer.train()
        losses = [round(record["loss"], 4) for record in trainer.state.log_history if "loss" in record]
    teacher.half().save_pretrained(options.out / "teacher")
    processor.save_pretrained(options.out / "teacher")

    teacher, processor = load_llava(options.out / "teacher")
    questions = list(to_conversations(test, CLASSES, options.seed))
    scores = {}
    for name, blank in (("scores", False), ("blind", True)):
        answers = generate_answers(teacher, processor, questions, batch_size=128, max_new_tokens=128, blank_image=blank)
        scores[name] = score_answers(questions, answers)
    return {"steps": settings.steps, "loss_every_100_steps": losses, **scores}


if __name__ == "__main__":
    main()
