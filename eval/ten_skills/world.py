"""The rendered world of ten visual-QA skills, each the small sibling of a benchmark of the Switch-KD paper.

skill         sibling     question                                          answer
existence     POPE        is there any red square ?                         yes or no, half and half
perception    MME         is the circle striped ? (red, big)                yes or no, half and half
choice        MMBench     which colour ? A red B blue C green D white       the letter
choice_cn     MMBench-CN  nage yanse ? jia hong yi lan bing lv ding bai     the same in a second vocabulary
attributes    VQAv2       what colour is the circle ? (striped one)         one of 8 colours
relations     GQA         what is left of the red one ?                     one of 6 shapes
chart         ScienceQA   what colour is the tallest bar ?                  one of 8 colours
reasoning     MMMU        what is left plus right ? (minus)                 a number of 1 to 6
text          TextVQA     what does the sign say ?                          two letters of 8
degraded      VizWiz      what shape is the red one ?                       one of 6 shapes, a fifth unanswerable
locate        (none)      where is the largest defect ?                     x1 y1 x2 y2 on a grid of 8, or none

`skills` draws what is asked and shown, `scenes` renders it (`switchkd.data.steel` that of the last), and the language,
`words`, has one token a word. Answers are drawn before the pictures, so that a question says nothing about its answer.
Every picture but the last's also has a caption, for the stage before questions. Everything follows from (split, seed,
number). Ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.ten_skills.scenes import Draws, Scenes, render
from eval.ten_skills.skills import BY_NAME
from eval.ten_skills.words import (
    ANSWER_ID,
    CAPTION_LENGTH,
    END_ID,
    IMAGE_ID,
    NUMBERS,
    PAD_ID,
    VOCABULARY,
    captions,
    ids_of,
    join,
    processor,
    text_of,
    tokenizer,
)
from switchkd.data.conversations import Conversation
from switchkd.data.steel import render_steel

__all__ = [
    "LOCATE",
    "SKILLS",
    "SPLITS",
    "TEXT_LENGTH",
    "VOCABULARY",
    "Samples",
    "chance",
    "conversations",
    "draw_samples",
    "located",
    "make_samples",
    "processor",
    "sequences",
    "text_of",
    "tokenizer",
]

SKILLS: tuple[str, ...] = tuple(BY_NAME)
LOCATE = "locate"
SPLITS = ("train", "validation", "test")
QUESTION_LENGTH, ANSWER_LENGTH = 11, 5  # tokens of the longest; an answer with its end token
TEXT_LENGTH = 15  # of the longest question with <answer>, its answer and <end>
GRID = 8  # of located answers


@dataclass
class Samples:
    """N samples; `samples[index]` are those of a slice or an array of numbers.

    images: uint8 [N, S, S, 3]. questions: int64 [N, QUESTION_LENGTH]. answers: int64 [N, ANSWER_LENGTH], each closed by
    END_ID; both padded on the right with PAD_ID. skills: int64 [N], places in `names`. scenes: what the pictures show,
    empty for `LOCATE`. ids: a name a sample, "train-0-existence-17".
    """

    names: tuple[str, ...]
    images: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    skills: np.ndarray
    scenes: Scenes
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.skills)

    def __getitem__(self, index) -> Samples:
        arrays = (self.images, self.questions, self.answers, self.skills, self.scenes, self.ids)
        return Samples(self.names, *(array[index] for array in arrays))


def make_samples(
    split: str, count: int, seed: int, *, skills: Sequence[str] | None = None, size: int = 48, first: int = 0
) -> Samples:
    """Samples `first` to `first + count` of a stream in which the skills take turns (default: the ten).

    A skill's own samples are the same whatever the other skills, `count` and `first`, so that workers may share a
    stream out; splits and seeds have streams of their own. size: pixels of a picture's side, an even number.
    Raises ValueError for an unknown split or skill and a bad count or size.
    """
    skills = SKILLS if skills is None else tuple(skills)
    unknown = [skill for skill in skills if skill not in BY_NAME and skill != LOCATE]
    if unknown or not skills or len(set(skills)) < len(skills):
        raise ValueError(f"skills are {list(skills)}: give different ones of {', '.join((*SKILLS, LOCATE))}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    if min(count, seed, first) < 0 or size < 32 or size % 2:
        raise ValueError(
            f"make_samples: count is {count}, seed {seed}, first {first} and size {size};"
            " give numbers of 0 or more and an even size of 32 pixels or more"
        )
    turn = np.arange(first, first + count)
    samples = Samples(
        skills,
        np.empty((count, size, size, 3), np.uint8),
        np.full((count, QUESTION_LENGTH), PAD_ID),
        np.full((count, ANSWER_LENGTH), PAD_ID),
        turn % len(skills),
        Scenes.empty(count),
        np.empty(count, object),
    )
    for place, skill in enumerate(skills):
        rows = np.flatnonzero(samples.skills == place)
        if not len(rows):
            continue
        numbers = turn[rows] // len(skills)
        key = (SPLITS.index(split), seed, (*SKILLS, LOCATE).index(skill))
        draws = Draws(key, int(numbers[0]), len(rows))
        if skill == LOCATE:
            samples.images[rows], question, answer = _locate(key, int(numbers[0]), len(rows), size)
        else:
            scenes, question, answer = BY_NAME[skill](draws)
            samples.scenes[rows] = scenes
            samples.images[rows] = render(scenes, draws, size)
        samples.questions[rows, : question.shape[1]] = question
        samples.answers[rows, : answer.shape[1]] = answer
        samples.answers[rows, (answer != PAD_ID).sum(axis=1)] = END_ID
        samples.ids[rows] = [f"{split}-{seed}-{skill}-{number}" for number in numbers]
    return samples


def sequences(
    samples: Samples, image_tokens: int, captioned: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and labels, int64 [N, image_tokens + TEXT_LENGTH]: the image tokens, the question, <answer>, the
    answer and <end>, padded on the right with PAD_ID; labels are -100 but at the answer and its end, as `encode` gives.

    captioned: bool [N], the rows that have no question and tell what their picture shows (`words.captions`), as
    pictures do in the stage before questions; where any does, T is image_tokens + 1 + CAPTION_LENGTH. ValueError where
    one is of `LOCATE`, whose pictures are no scenes. A sample's exact match under greedy decoding is that the argmax at
    every label equals it.
    """
    length, questions, answers = TEXT_LENGTH, samples.questions, samples.answers
    if captioned is not None and captioned.any():
        if LOCATE in samples.names and (samples.skills[captioned] == samples.names.index(LOCATE)).any():
            raise ValueError(f"captioned has samples of {LOCATE!r}: a strip of steel has no scene to tell of")
        length = 1 + CAPTION_LENGTH
        questions = np.where(captioned[:, None], PAD_ID, questions)
        answers = np.pad(answers, ((0, 0), (0, CAPTION_LENGTH - ANSWER_LENGTH)), constant_values=PAD_ID)
        answers[captioned] = captions(samples.scenes[captioned])
    marks = np.full((len(samples), 1), ANSWER_ID)
    text = np.concatenate([questions, marks, answers], axis=1)
    is_answer = np.arange(text.shape[1]) > QUESTION_LENGTH
    order = np.argsort(text == PAD_ID, axis=1, kind="stable")[:, :length]
    text = np.take_along_axis(text, order, axis=1)
    labels = np.where(is_answer[order] & (text != PAD_ID), text, -100)
    images = np.full((len(samples), image_tokens), IMAGE_ID)
    return np.concatenate([images, text], axis=1), np.concatenate([np.full_like(images, -100), labels], axis=1)


def chance(samples: Samples) -> dict[str, float]:
    """The share of the majority answer of each skill that occurs: what one fixed answer scores."""
    shares = {}
    for place, skill in enumerate(samples.names):
        answers = samples.answers[samples.skills == place]
        if len(answers):
            shares[skill] = float(np.unique(answers, axis=0, return_counts=True)[1].max() / len(answers))
    return shares


def located(answers: np.ndarray, references: np.ndarray, iou: float = 0.5) -> np.ndarray:
    """Which answers [N, ANSWER_LENGTH] of `LOCATE` are right, bool [N]: boxes that overlap by `iou` or more, or none
    for none. Anything else than four numbers, or none, and the end is wrong."""
    boxes, is_box = _boxes(answers)
    wanted, exists = _boxes(references)
    corner = np.minimum(boxes[:, 2:], wanted[:, 2:]) - np.maximum(boxes[:, :2], wanted[:, :2])
    shared = np.clip(corner, 0, None).prod(axis=1)
    areas = sum(np.clip(each[:, 2:] - each[:, :2], 0, None).prod(axis=1) for each in (boxes, wanted))
    overlaps = shared >= iou * np.maximum(areas - shared, 1)
    same = (answers[:, :2] == references[:, :2]).all(axis=1)
    return np.where(exists, is_box & overlaps, same)


def _boxes(answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = answers[:, :4] - ids_of("0")[0]
    is_box = ((numbers >= 0) & (numbers <= GRID)).all(axis=1) & (answers[:, 4] == END_ID)
    return numbers, is_box


def conversations(samples: Samples) -> list[Conversation]:
    """The same samples for `ConversationDataset` and `DistillTrainer`; the kind is the skill."""
    made = []
    for row, sample in enumerate(samples.ids):
        question, answer = text_of(samples.questions[row]), text_of(samples.answers[row])
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        kind = samples.names[samples.skills[row]]
        made.append(Conversation(sample, messages, [Image.fromarray(samples.images[row])], kind=kind))
    return made


def draw_samples(samples: Samples, *, columns: int = 4, side: int = 192) -> Image.Image:
    """A sheet of the samples, each enlarged to `side` pixels, with its skill, question and answer below."""
    margin, line, font = 8, 16, ImageFont.load_default(12)
    captions = [
        (name, text_of(question), text_of(answer))
        for name, question, answer in zip(samples.ids, samples.questions, samples.answers, strict=True)
    ]
    widest = max((font.getlength(caption) for each in captions for caption in each), default=0)
    width, height = max(side, math.ceil(widest)) + 2 * margin, side + 3 * line + 2 * margin
    sheet = Image.new("RGB", (columns * width, math.ceil(len(samples) / columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, lines in enumerate(captions):
        left, top = row % columns * width + margin, row // columns * height + margin
        picture = Image.fromarray(samples.images[row]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        for number, caption in enumerate(lines):
            pen.text((left, top + side + number * line), caption, fill="black", font=font)
    return sheet


def _locate(key: tuple[int, ...], first: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steel strip and the box of its largest defect, rounded outward to the grid."""
    split, seed, _ = key
    strips = render_steel(count, len(SPLITS) * seed + split, size=size, first=first)
    answer = np.full((count, 4), PAD_ID)
    for row, strip in enumerate(strips):
        if not strip.boxes:
            answer[row, 0] = ids_of("none")[0]
            continue
        x1, y1, x2, y2 = max(strip.boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        corners = [math.floor(v * GRID / size) for v in (x1, y1)] + [math.ceil(v * GRID / size) for v in (x2, y2)]
        answer[row] = ids_of(NUMBERS)[corners]
    images = np.stack([np.asarray(strip.image) for strip in strips])
    return images, join("where is the largest defect ?"), answer
