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

The pictures are `scenes` (and `steel` for the last), the language has one token a word. Answers are drawn before the
pictures, so that a question says nothing about its answer. Every picture but the last's also has a caption, for the
stage before questions. Everything follows from (split, seed, number). Ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from switchkd.data.conversations.conversation import Conversation
from switchkd.data.scenes import COLOURS, FAULTS, SHAPES, SIZES, SPRITES, SURFACES, Draws, Scenes, render
from switchkd.data.steel import render_steel
from switchkd.data.words import (
    ANSWER_ID,
    CAPTION_LENGTH,
    COLOURS_CN,
    END_ID,
    IMAGE_ID,
    LETTERS,
    NUMBERS,
    OPTIONS,
    OPTIONS_CN,
    PAD_ID,
    SHAPES_CN,
    SURFACES_CN,
    VOCABULARY,
    captions,
    closed_up,
    ids_of,
    join,
    processor,
    text_of,
    tokenizer,
)

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
        parts = (self.images, self.questions, self.answers, self.skills, self.scenes, self.ids)
        return Samples(self.names, *(part[index] for part in parts))


def make_samples(
    split: str, count: int, seed: int, *, skills: Sequence[str] | None = None, size: int = 48, first: int = 0
) -> Samples:
    """Samples `first` to `first + count` of a stream in which the skills take turns (default: the ten).

    A skill's own samples are the same whatever the other skills, `count` and `first`, so that workers may share a
    stream out; splits and seeds have streams of their own. size: pixels of a picture's side, an even number.
    Raises ValueError for an unknown split or skill and a bad count or size.
    """
    skills = SKILLS if skills is None else tuple(skills)
    unknown = [skill for skill in skills if skill not in _SKILLS and skill != LOCATE]
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
            scenes, question, answer = _SKILLS[skill](draws)
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


_COLOUR, _SHAPE, _SURFACE, _SIZE = ids_of(tuple(COLOURS)), ids_of(SHAPES), ids_of(SURFACES), ids_of(SIZES)
_NUMBER, _LETTER = ids_of(NUMBERS), ids_of(LETTERS)
_YES_NO = ids_of(("no", "yes"))


def _existence(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One to three objects; yes: the asked one, no: one that shares its colour or its shape. The second shares one of
    them in half of both, the third neither."""
    scenes, cells, objects = Scenes.empty(draws.count), draws.order(4), 1 + draws.below(3)
    colour, shape, yes = draws.below(8), draws.below(6), draws.below(2)
    # what an object shares: 0 the colour, 1 the shape, 2 neither, 3 both
    first = np.where(yes, 3, draws.below(2))
    second = np.minimum(draws.below(4), 2)
    for number, shared in enumerate((first, second, np.full(draws.count, 2))):
        hue = np.where((shared == 0) | (shared == 3), colour, draws.other(colour, 8))
        form = np.where((shared == 1) | (shared == 3), shape, draws.other(shape, 6))
        scenes.put(cells[:, number], form, hue, where=number < objects)
    return scenes, join("is there any", _COLOUR[colour], _SHAPE[shape], "?"), _YES_NO[yes][:, None]


def _perception(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One or two objects of different shapes; the first is asked about its colour, surface or size. The second has what
    is asked about in half of the pictures, for a yes as for a no."""
    scenes, cells, shapes = Scenes.empty(draws.count), draws.order(4), draws.order(6)
    yes, asked, second = draws.below(2), draws.below(3), draws.below(2)
    question = np.zeros((3, draws.count), np.int64)
    has = np.zeros((2, 3, draws.count), np.int64)
    for kind, high in enumerate((8, 4, 2)):
        value = draws.below(high)
        question[kind] = value
        has[0, kind] = np.where(yes, value, draws.other(value, high))
        has[1, kind] = np.where(draws.below(2), value, draws.other(value, high))
    for number in range(2):
        scenes.put(cells[:, number], shapes[:, number], *has[number], where=number <= second)
    word = np.choose(asked, [_COLOUR[question[0]], _SURFACE[question[1]], _SIZE[question[2]]])
    return scenes, join("is the", _SHAPE[shapes[:, 0]], word, "?"), _YES_NO[yes][:, None]


def _choice(draws: Draws, cn: bool = False) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One object; its colour, shape or surface is one of four options."""
    scenes = Scenes.empty(draws.count)
    colours, shapes, surfaces = draws.order(8)[:, :4], draws.order(6)[:, :4], draws.order(4)
    asked, right = draws.below(3), draws.below(4)
    rows = np.arange(draws.count)
    scenes.put(draws.below(4), shapes[rows, right], colours[rows, right], surfaces[rows, right])
    colour_words, shape_words, surface_words = (
        (COLOURS_CN, SHAPES_CN, SURFACES_CN) if cn else (COLOURS, SHAPES, SURFACES)
    )
    options = np.where(
        (asked == 0)[:, None],
        ids_of(tuple(colour_words))[colours],
        np.where((asked == 1)[:, None], ids_of(shape_words)[shapes], ids_of(surface_words)[surfaces]),
    )
    kinds = ids_of(("yanse", "xingzhuang", "biaomian") if cn else ("colour", "shape", "surface"))[asked]
    marks = ids_of(OPTIONS_CN if cn else OPTIONS)
    pairs = [part for place in range(4) for part in (marks[place], options[:, place])]
    return scenes, join("nage" if cn else "which", kinds, "?", *pairs), marks[right][:, None]


def _choice_cn(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    return _choice(draws, cn=True)


def _attributes(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One to three objects of different shapes and surfaces; one is named by either and asked for its colour."""
    scenes, cells, objects = Scenes.empty(draws.count), draws.order(4), 1 + draws.below(3)
    shapes, surfaces, colours = draws.order(6), draws.order(4), draws.order(8)
    for number in range(3):
        table = (shapes, colours, surfaces)
        scenes.put(cells[:, number], *(each[:, number] for each in table), where=number < objects)
    by_shape = draws.below(2) == 1
    name = np.where(by_shape, _SHAPE[shapes[:, 0]], _SURFACE[surfaces[:, 0]])
    one = np.where(by_shape, PAD_ID, ids_of("one"))
    question = join("what colour is the", name, one, "?")
    return scenes, closed_up(question), _COLOUR[colours[:, 0]][:, None]


def _relations(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """A named object and the asked one beside, above or below it; in half of the pictures a third one on its other
    side. Colours and shapes are all different."""
    scenes, shapes, colours = Scenes.empty(draws.count), draws.order(6), draws.order(8)
    row, column = draws.below(2), draws.below(2)
    upright, third = draws.below(2), draws.below(2)
    for number, (y, x) in enumerate(((row, column), (row, 1 - column), (1 - row, column))):
        there = (number == 0) | (number == 1 + upright) | (third == 1)
        scenes.put(2 * y + x, shapes[:, number], colours[:, number], where=there)
    sideways = np.where(column == 1, ids_of("left"), ids_of("right"))
    place = np.where(upright, np.where(row == 1, ids_of("above"), ids_of("below")), sideways)
    of = np.where(upright, PAD_ID, ids_of("of"))
    question = join("what is", place, of, "the", _COLOUR[colours[:, 0]], "one ?")
    return scenes, closed_up(question), _SHAPE[np.where(upright, shapes[:, 2], shapes[:, 1])][:, None]


def _chart(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """Two to four bars of different heights and colours; the tallest or the shortest is asked for its colour."""
    scenes, heights, colours = Scenes.empty(draws.count), draws.order(4) + 1, draws.order(8)
    shown = draws.order(4) < (2 + draws.below(3))[:, None]
    scenes.bars[:] = np.where(shown, heights, 0)
    scenes.colour[:] = colours[:, :4]
    tallest = draws.below(2) == 1
    bar = np.where(tallest, scenes.bars.argmax(axis=1), np.where(shown, heights, 9).argmin(axis=1))
    which = np.where(tallest, ids_of("tallest"), ids_of("shortest"))
    answer = _COLOUR[colours[np.arange(draws.count), bar]]
    return scenes, join("what colour is the", which, "bar ?"), answer[:, None]


def _reasoning(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """Two digits side by side, to be added or the right one taken from the left one: 1 to 6 either way."""
    scenes, result, plus = Scenes.empty(draws.count), 1 + draws.below(6), draws.below(2)
    spare = draws.below(420)  # a multiple of 2 to 7, so that each way to a result is as likely
    right = np.where(plus, spare % (result + 1), spare % (7 - result))
    left = np.where(plus, result - right, result + right)
    row = draws.below(2)
    for column, digit in enumerate((left, right)):
        scenes.put(2 * row + column, SPRITES.index("0") + digit, draws.below(8))
    sign = np.where(plus, ids_of("plus"), ids_of("minus"))
    return scenes, join("what is left", sign, "right ?"), _NUMBER[result][:, None]


def _text(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """A word of two letters on one line, each in a colour of its own."""
    scenes, row = Scenes.empty(draws.count), draws.below(2)
    letters = [draws.below(8), draws.below(8)]
    for column, letter in enumerate(letters):
        scenes.put(2 * row + column, SPRITES.index("E") + letter, draws.below(8))
    answer = np.stack([_LETTER[letter] for letter in letters], axis=1)
    return scenes, join("what does the sign say ?"), answer


def _degraded(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One object in a blurred, dark or noisy picture. A fifth is unanswerable: the picture is ruined, or its object
    has another colour than the asked."""
    scenes, shape, colour = Scenes.empty(draws.count), draws.below(6), draws.below(8)
    ruined = draws.below(10) == 0
    absent = ~ruined & (draws.below(9) == 0)
    scenes.put(draws.below(4), shape, np.where(absent, draws.other(colour, 8), colour))
    scenes.fault[:] = np.where(ruined, FAULTS.index("ruined"), draws.below(4))
    answer = np.where(ruined | absent, ids_of("unanswerable"), _SHAPE[shape])
    return scenes, join("what shape is the", _COLOUR[colour], "one ?"), answer[:, None]


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
        answer[row] = _NUMBER[corners]
    images = np.stack([np.asarray(strip.image) for strip in strips])
    return images, join("where is the largest defect ?"), answer


_SKILLS = {
    "existence": _existence,
    "perception": _perception,
    "choice": _choice,
    "choice_cn": _choice_cn,
    "attributes": _attributes,
    "relations": _relations,
    "chart": _chart,
    "reasoning": _reasoning,
    "text": _text,
    "degraded": _degraded,
}
SKILLS: tuple[str, ...] = tuple(_SKILLS)
LOCATE = "locate"
