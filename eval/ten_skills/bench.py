"""The work of one size: towers, teacher, students' starts and runs, each made once and kept."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, set_seed

from eval.records import Job, digest
from eval.ten_skills import models, world
from eval.ten_skills.fast_step import ALL_SKILLS, Feed, average, draw, orders, score, train
from eval.ten_skills.sizes import Size
from eval.ten_skills.variants import variant
from switchkd.methods import SupervisedMethod
from switchkd.models import freeze

NOT_EVIDENCE = "machinery check, not evidence"
TRAIN_SEEDS = {"teacher": 0, "students": 1, "starts": 2, "tower": 3, "apart": 4}  # of the train split's streams
CURVE = (330, 5)  # validation samples and points of a run's curve
TEACHER = "teacher"  # the row of the teacher itself (start "", seed 0), and the start from its tower


class Bench:
    """The bench of `eval.runner`. size: of the models and the steps. work: folder of the weights, in which settings
    have a folder each. drawers: processes that draw the samples."""

    def __init__(
        self,
        size: Size,
        work: Path,
        *,
        device: str = "cpu",
        drawers: int = 1,
    ):
        self.size, self.device = size, torch.device(device)
        self.teacher_work = work / f"{size.name}-teacher-{digest(self.settings() | {'size': size.teacher_settings()})}"
        self.work = work / f"{size.name}-students-{digest(self.settings())}"
        self.drawers = drawers
        self._feeds: dict[tuple, Feed] = {}
        self._teacher: LlavaForConditionalGeneration | None = None

    # ---- What decides a result

    def settings(self, job: Job | None = None) -> dict:
        """What decides a job's record, the world's samples included, or without a job what all jobs share."""
        settings = {"size": self.size.settings(), "world": _world(self.size.image)}
        if job is None:
            return settings
        if job.variant == TEACHER:
            settings["size"] = self.size.teacher_settings() | {"judged": self.size.judged}
        kept = {} if job.variant == TEACHER else variant(job.variant).settings()
        return settings | {"variant": kept, "start": job.start, "seed": job.seed, "split": job.split}

    # ---- What several runs share

    def tower(self, name: str) -> Path:
        """The pretrained vision tower of the teacher ("tower"), of the students' ("apart"), or their narrow one."""
        size, is_teachers = self.size, name == "tower"
        path = (self.teacher_work if is_teachers else self.work) / f"{name}.safetensors"
        if not path.exists():
            steps, stream = (size.tower_steps, "tower") if is_teachers else (size.apart_steps, "apart")
            set_seed(TRAIN_SEEDS[stream])
            model = self._build(size.teacher, size.narrow if name == "narrow" else size.vision)
            feed = self._draw("train", stream, min(size.teacher_samples, steps * size.tower_batch))
            named = models.pretrain_tower(
                model, feed, size, steps=steps, seed=0, say=lambda line: _say(f"  {name}: {line}")
            )
            _say(f"  {name}: {100 * named:.0f} % of the sprites named")
            self._save(model.model.vision_tower, path)
        return path

    def teacher(self) -> LlavaForConditionalGeneration:
        """The teacher, trained at the first call of all, else loaded."""
        if self._teacher is not None:
            return self._teacher
        size, path = self.size, self.teacher_work / "teacher.safetensors"
        set_seed(TRAIN_SEEDS["teacher"])
        model = self._build(size.teacher, size.vision)
        if path.exists():
            _load(model, path)
        else:
            _load(model.model.vision_tower, self.tower("tower"))
            started, curve = time.monotonic(), []
            method = SupervisedMethod(model)
            feed = self._draw("train", "teacher", size.teacher_samples, size.captioned)
            order = orders(len(feed), size.teacher_steps, size.teacher_batch, 0)
            each = self._watch(TEACHER, model, size.teacher_steps, curve, started)
            train(method, feed, order, lr=size.teacher_lr, bf16=size.bf16, each=each)
            self._save(model, path)
            training = {"seconds": time.monotonic() - started, "curve": curve}
            _write_json(self.teacher_work / "teacher.json", training)
        self._teacher = model.requires_grad_(False).eval()
        return self._teacher

    def start(self, start: str, seed: int, narrow: bool = False) -> LlavaForConditionalGeneration:
        """The student that all variants of this start and seed begin from: its tower from the teacher's or apart from
        it, its projector and language model from the seed and pretrained on captions with the tower frozen.
        """
        size = self.size
        set_seed(1000 + seed)
        model = self._build(size.student, size.narrow if narrow else size.vision)
        name = "narrow" if narrow else start
        path = self.work / f"start-{name}-{seed}.safetensors"
        if path.exists():
            _load(model, path)
            return model
        if start == TEACHER:
            model.model.vision_tower.load_state_dict(self.teacher().model.vision_tower.state_dict())
        else:
            _load(model.model.vision_tower, self.tower(name))
        if size.start_steps:
            started = time.monotonic()
            feed = self.feed("train", "starts", min(size.samples, size.start_steps * size.batch_size), 1.0)
            freeze(model, ("vision_tower",))
            order = orders(len(feed), size.start_steps, size.batch_size, seed)
            train(SupervisedMethod(model), feed, order, lr=size.lr, bf16=size.bf16)
            freeze(model)
            _say(f"  start {name}, seed {seed}: {time.monotonic() - started:.0f} s")
        self._save(model, path)
        return model

    # ---- One run

    def run(self, job: Job) -> dict:
        """Trains and judges."""
        started, curve, losses = time.monotonic(), [], {}
        size, extra = self.size, {}
        if job.variant == TEACHER:
            model, blank, steps, lr = self.teacher(), False, size.teacher_steps, size.teacher_lr
            extra = json.loads((self.teacher_work / "teacher.json").read_text())
        else:
            row = variant(job.variant)
            model = self.start(job.start, job.seed, row.narrow)
            freeze(model, row.freeze)
            blank, steps, lr = row.blank, size.steps, size.lr * row.lr
            if row.equal_flops:
                extra["flops"] = self.flops_ratio()
                steps = round(steps * extra["flops"])
            feed = self.feed("train", "students", size.samples)
            teacher = None if row.options is None else self.teacher()
            set_seed(job.seed)
            method = row.method(model, teacher, feed.batch(slice(0, 330))["pixel_values"])
            order = orders(len(feed), steps, size.batch_size, job.seed)
            each = self._watch(job.variant, model, steps, curve, started, losses, quiet=True, blank=blank)
            train(method, feed, order, lr=lr, blank=blank, bf16=size.bf16, each=each)
            extra |= {"curve": curve, "losses": {name: float(total) for name, total in losses.items()}}
        judged = self.feed(job.split, job.split, size.judged)
        scores = score(model, judged, blank=blank, bf16=size.bf16)
        return {
            "size": size.name,
            "average": average(scores),
            "skills": {name: scores[name] for name in world.SKILLS},
            "locate": scores[world.LOCATE],
            "chance": {name: 100 * share for name, share in world.chance(judged.samples).items()},
            "steps": steps,
            "lr": lr,
            **extra,
            "evidence": True if size.evidence else NOT_EVIDENCE,
            "weights": weights_hash(model),
        }

    def flops_ratio(self) -> float:
        """Arithmetic of one step of the paper's variant over one of SFT, counted on 4 samples, attention included."""
        counts = []
        with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
            teacher = models.build_model(self.size, self.size.teacher, self.size.vision)
            for name in ("switch_kd", "sft"):
                student = models.build_model(self.size, self.size.student, self.size.vision)
                feed = Feed.of(draw("train", 11, 0, self.size.image), self.size.image_tokens)
                method = variant(name).method(student, teacher, feed.batch(slice(0, 4))["pixel_values"])
                with FlopCounterMode(display=False) as counter:
                    method(**feed.batch(slice(0, 4))).loss.backward()
                counts.append(counter.get_total_flops())
        return counts[0] / counts[1]

    def _build(self, language: tuple[int, int], vision: tuple[int, int]) -> LlavaForConditionalGeneration:
        model = models.build_model(self.size, language, vision).to(self.device)
        if self.device.type == "cpu":  # where torch's flash attention is slower backwards than matrices written out
            model.set_attn_implementation("eager")
        return model

    def feed(self, split: str, stream: str, count: int, captioned: float = 0.0) -> Feed:
        """`count` samples on the device, kept for the next run of this process; `stream` names what they are for."""
        key = (split, stream, count, captioned)
        if key not in self._feeds:
            self._feeds[key] = self._draw(*key)
        return self._feeds[key]

    def _draw(self, split: str, stream: str, count: int, captioned: float = 0.0) -> Feed:
        seed = TRAIN_SEEDS.get(stream, 0)
        if self.drawers > 1 and count > 10_000:
            with ProcessPoolExecutor(self.drawers, mp_context=get_context("spawn")) as pool:
                samples = draw(split, count, seed, self.size.image, pool)
        else:
            samples = draw(split, count, seed, self.size.image)
        return Feed.of(samples, self.size.image_tokens, self.device, captioned=captioned)

    def _watch(self, name, model, steps, curve, started, losses=None, *, quiet=False, blank=False):
        """What `train` calls: the validation average at `CURVE` points, and the mean terms of the last tenth."""
        count, points = CURVE
        feed, marks = self.feed("validation", "curve", count), {round(steps * (i + 1) / points) for i in range(points)}

        def each(step: int, named: dict) -> None:
            if losses is not None and step > steps - max(steps // 10, 1):
                for term, value in named.items():
                    losses[term] = losses.get(term, 0.0) + value / max(steps // 10, 1)
            if step in marks:
                curve.append([step, round(average(score(model, feed, blank=blank, bf16=self.size.bf16)), 2)])
                if not quiet:
                    seconds = time.monotonic() - started
                    _say(f"  {name}: step {step} of {steps}, average {curve[-1][1]:.1f}, {seconds:.0f} s")

        return each

    def _save(self, module: nn.Module, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
        state = module.state_dict()
        save_file({name: value.cpu().clone() for name, value in state.items()}, staged)  # tied ones each by its name
        os.replace(staged, path)


def _say(line: str) -> None:
    print(line, flush=True)


def _load(module: nn.Module, path: Path) -> None:
    module.load_state_dict(load_file(path))


def _write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    staged.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(staged, path)


def weights_hash(model: nn.Module) -> str:
    """Of all weights as they are in float32."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


@functools.lru_cache
def _world(size: int) -> str:
    """A fingerprint of the samples: of 330 of each split."""
    sha = hashlib.sha256()
    for split in world.SPLITS:
        samples = world.make_samples(split, 330, 0, skills=ALL_SKILLS, size=size)
        for array in (samples.images, samples.questions, samples.answers):
            sha.update(array.tobytes())
    return sha.hexdigest()[:10]
