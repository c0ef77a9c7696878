"""Training and scoring on the ten skills without a data loader: all samples lie on the device, a batch is an index.

`train` takes the steps that `DistillTrainer` would take (a test holds it to that), `score` reads exact match off one
forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, get_scheduler

from eval.ten_skills import world
from eval.ten_skills.words import IMAGE_ID, PAD_ID
from switchkd.models.pathway import pathway_of

CHUNK = 330  # samples a worker draws at a time; below it the sprites' tables cost more than the pictures
ALL_SKILLS = (*world.SKILLS, world.LOCATE)


@dataclass
class Feed:
    """N samples on a device.

    images: uint8 [N, 3, S, S]. input_ids, labels: int64 [N, T]. samples: the same ones in numpy.
    """

    images: Tensor
    input_ids: Tensor
    labels: Tensor
    samples: world.Samples

    @classmethod
    def of(
        cls, samples: world.Samples, image_tokens: int, device: torch.device | str = "cpu", *, captioned: float = 0.0
    ) -> Feed:
        """captioned: the share of samples, evenly spread, that tell their picture and are not asked; those of `LOCATE`
        are always asked."""
        number = np.arange(len(samples)) // len(samples.names)  # of a sample among those of its skill
        tells = np.floor((number + 1) * captioned) > np.floor(number * captioned)
        if world.LOCATE in samples.names:
            tells &= samples.skills != samples.names.index(world.LOCATE)
        input_ids, labels = world.sequences(samples, image_tokens, tells)
        images = torch.from_numpy(np.ascontiguousarray(samples.images.transpose(0, 3, 1, 2)))
        return cls(images.to(device), *(torch.from_numpy(each).to(device) for each in (input_ids, labels)), samples)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor | slice, blank: bool = False) -> dict[str, Tensor]:
        """What a method's forward takes; pixels from -1 to 1 as `words.processor` makes them, all 0 where blank.

        There is no mask: padding is on the right, where no answer position sees it.
        """
        pixels = self.images[rows].float().div_(127.5).sub_(1)
        if blank:
            pixels.zero_()
        return {"input_ids": self.input_ids[rows], "pixel_values": pixels, "labels": self.labels[rows]}


def draw(split: str, count: int, seed: int, size: int, pool: Executor | None = None) -> world.Samples:
    """`count` samples of all skills and `LOCATE`, in chunks that a pool's processes share out; the same without."""
    firsts = range(0, count, CHUNK)
    jobs = [(split, min(CHUNK, count - first), seed, size, first) for first in firsts]
    chunks = list((pool.map if pool else map)(_chunk, jobs))
    whole = world.make_samples(split, 0, seed, skills=ALL_SKILLS, size=size)
    arrays = {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("images", "questions", "answers", "skills", "ids")
    }
    scenes = type(whole.scenes)(
        *(np.concatenate([getattr(chunk.scenes, name) for chunk in chunks]) for name in vars(whole.scenes))
    )
    return world.Samples(whole.names, scenes=scenes, **arrays)


def _chunk(job: tuple) -> world.Samples:
    split, count, seed, size, first = job
    return world.make_samples(split, count, seed, skills=ALL_SKILLS, size=size, first=first)


def orders(count: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """Numbers of the samples of each step [steps, batch_size]: shuffled passes over `count` samples, end to end."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return order[: steps * batch_size].view(steps, batch_size)


def train(
    method: nn.Module,
    feed: Feed,
    order: Tensor,
    *,
    lr: float,
    warmup: float = 0.05,
    clip: float = 1.0,
    blank: bool = False,
    bf16: bool = False,
    each: Callable[[int, dict[str, Tensor]], None] = lambda step, named: None,
) -> None:
    """One step of AdamW a row of `order` [steps, batch_size]: cosine schedule after `warmup` (a share of the steps),
    no weight decay, gradients clipped to the norm `clip`; bf16: under bfloat16 autocast.

    each: called after each step with the number of steps done and the loss terms.
    """
    device = feed.images.device
    order = order.to(device)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    steps = len(order)
    schedule = get_scheduler("cosine", optimizer, math.ceil(warmup * steps), steps)
    method.train()
    for step, rows in enumerate(order):
        method.progress(step / steps)
        with autocast(device, bf16):
            terms = method(**feed.batch(rows, blank))
        terms.loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        each(step + 1, terms.named)


def autocast(device: torch.device, bf16: bool):
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@torch.no_grad()
def score(
    model: LlavaForConditionalGeneration,
    feed: Feed,
    *,
    blank: bool = False,
    bf16: bool = False,
    batch_size: int = 500,
) -> dict[str, float]:
    """Exact match of each skill in per cent, `LOCATE` by overlap (`ten_skills.located`).

    A skill's answer is right under greedy decoding exactly when the argmax at every label is the label; a box may be
    right without being equal, so that `LOCATE` is decoded.
    """
    was_training = model.training
    model.eval()
    right = np.zeros(len(feed), bool)
    names = feed.samples.names
    is_box = feed.samples.skills == names.index(world.LOCATE) if world.LOCATE in names else right.copy()
    for rows in _chunks(np.arange(len(feed)), batch_size):
        batch = feed.batch(torch.from_numpy(rows).to(feed.images.device), blank)
        with autocast(feed.images.device, bf16):
            tokens = _greedy(model, batch["input_ids"], batch["pixel_values"])
        known = batch["labels"][:, 1:]
        right[rows] = ((tokens == known) | (known == -100)).all(dim=1).cpu().numpy()
    for rows in _chunks(np.flatnonzero(is_box), batch_size):
        batch = feed.batch(torch.from_numpy(rows).to(feed.images.device), blank)
        with autocast(feed.images.device, bf16):
            right[rows] = world.located(_decode(model, batch), feed.samples.answers[rows])
    model.train(was_training)
    return {
        name: 100 * float(right[feed.samples.skills == place].mean())
        for place, name in enumerate(names)
        if (feed.samples.skills == place).any()
    }


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _greedy(model: LlavaForConditionalGeneration, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
    """The most likely next token at every place but the last, [N, T - 1]."""
    path = pathway_of(model)
    hidden = path.decode(input_ids, None, path.project(path.encode(pixel_values)))
    return path.head(hidden[:, :-1]).argmax(dim=-1)


def _decode(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> np.ndarray:
    """Answers [N, ANSWER_LENGTH] made token by token; the longest has room after every question."""
    input_ids = batch["input_ids"].masked_fill(batch["labels"] != -100, PAD_ID)
    first = (batch["labels"] != -100).int().argmax(dim=1)
    every = torch.arange(len(first), device=first.device)
    for place in range(world.ANSWER_LENGTH):
        at = first + place
        said = _greedy(model, input_ids, batch["pixel_values"])[every, at - 1]
        # A wrong answer like any other, which must not take the place of a picture in the next pass.
        input_ids[every, at] = said.masked_fill(said == IMAGE_ID, PAD_ID)
    places = first[:, None] + torch.arange(world.ANSWER_LENGTH, device=first.device)
    return input_ids.gather(1, places).cpu().numpy()


def average(skills: dict[str, float], names: Sequence[str] = world.SKILLS) -> float:
    """The mean over the ten skills; `LOCATE` stays outside."""
    return float(np.mean([skills[name] for name in names]))
