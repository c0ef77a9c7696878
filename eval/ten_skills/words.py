"""The language of the ten skills: a closed vocabulary with one token a word, its tokenizer and processor. Ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from eval.ten_skills.scenes import COLOURS, FAULTS, GLYPHS, SHAPES, SIZES, SPRITES, SURFACES, Scenes

PAD, IMAGE, ANSWER, END = MARKS = ("<pad>", "<image>", "<answer>", "<end>")
PAD_ID, IMAGE_ID, ANSWER_ID, END_ID = range(4)
CAPTION_LENGTH = 17  # four words an object, and the end

NUMBERS = tuple("012345678")
LETTERS = tuple(glyph for glyph in GLYPHS if glyph.isalpha())
OPTIONS = ("A", "B", "C", "D")
# The second vocabulary is pinyin; its option marks are the first of the heavenly stems.
COLOURS_CN = ("hong", "cheng", "huang", "lv", "qing", "lan", "zi", "bai")
SHAPES_CN = ("yuan", "fang", "sanjiao", "shizi", "huan", "lingxing")
SURFACES_CN = ("chun", "tiaowen", "gewen", "dianwen")
OPTIONS_CN = ("jia", "yi", "bing", "ding")

_OTHERS = (
    "? above any bar below colour defect does is largest left minus no none of one plus right say shape shortest sign"
    " surface tallest the there unanswerable what where which yes nage yanse xingzhuang biaomian"
)
VOCABULARY: tuple[str, ...] = (
    *MARKS,
    *_OTHERS.split(),
    *(*COLOURS, *SHAPES, *SURFACES, *SIZES, *NUMBERS, *LETTERS, *OPTIONS),
    *(*COLOURS_CN, *SHAPES_CN, *SURFACES_CN, *OPTIONS_CN),
)
_ID = {word: number for number, word in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'user' %}<answer>{% else %}<end>{% endif %}{% endfor %}"
)


def ids_of(words: str | Sequence[str]) -> np.ndarray:
    """The ids of words, or of a text's words, [T]."""
    return np.array([_ID[word] for word in (words.split() if isinstance(words, str) else words)])


def text_of(ids: np.ndarray) -> str:
    """The words of one question or answer [T], without padding and end."""
    return " ".join(VOCABULARY[number] for number in ids if number not in (PAD_ID, END_ID))


def join(*parts: str | np.ndarray) -> np.ndarray:
    """Texts and ids [N] as ids [N, T], [1, T] of texts alone; a text stands in every row."""
    columns = []
    for part in parts:
        columns += list(ids_of(part)[:, None]) if isinstance(part, str) else [part]
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def closed_up(ids: np.ndarray) -> np.ndarray:
    """The rows of ids [N, T] with their padding moved to the end."""
    return np.take_along_axis(ids, np.argsort(ids == PAD_ID, axis=1, kind="stable"), axis=1)


def captions(scenes: Scenes) -> np.ndarray:
    """What each picture shows, cell by cell or bar by bar, ids [N, CAPTION_LENGTH] with PAD_ID after the end token.

    An object is its size, surface, colour and name ("big striped red circle"), a bar its colour and height ("red 3"),
    an empty place "none"; a ruined picture is "unanswerable".
    """
    objects = join(*(part for cell in range(4) for part in _object(scenes, cell)))
    bars = join(*(part for bar in range(4) for part in _bar(scenes, bar)))
    bars = np.pad(bars, ((0, 0), (0, objects.shape[1] - bars.shape[1])), constant_values=PAD_ID)
    text = np.where(scenes.bars.any(axis=1, keepdims=True), bars, objects)
    ruined = scenes.fault == FAULTS.index("ruined")
    text[ruined] = PAD_ID
    text[ruined, 0] = ids_of("unanswerable")
    text = closed_up(np.pad(text, ((0, 0), (0, 1)), constant_values=PAD_ID))
    text[np.arange(len(text)), (text != PAD_ID).sum(axis=1)] = END_ID
    return text


def _object(scenes: Scenes, cell: int) -> list[np.ndarray]:
    sprite = scenes.sprite[:, cell]
    words = [
        np.where(sprite < 0, PAD_ID, ids_of(names)[table[:, cell]])
        for names, table in ((SIZES, scenes.size), (SURFACES, scenes.surface), (tuple(COLOURS), scenes.colour))
    ]
    return [*words, np.where(sprite < 0, ids_of("none"), ids_of(SPRITES)[sprite])]


def _bar(scenes: Scenes, bar: int) -> list[np.ndarray]:
    height = scenes.bars[:, bar]
    colour = ids_of(tuple(COLOURS))[scenes.colour[:, bar]]
    return [np.where(height > 0, colour, ids_of("none")), np.where(height > 0, ids_of(NUMBERS)[height], PAD_ID)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of VOCABULARY; any other word is an error. It writes `question<answer>answer<end>`."""
    table = Tokenizer(models.WordLevel(dict(_ID), unk_token="<unk>"))  # no such row: this is what makes the error
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=table,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "answer_token": ANSWER},
        chat_template=CHAT_TEMPLATE,
    )


def processor(size: int, patch_size: int) -> LlavaProcessor:
    """For pictures of `size` pixels in (size / patch_size)^2 tokens, pixels scaled to -1..1."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": size, "width": size}),
        tokenizer=tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
