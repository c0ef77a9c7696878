"""What training reads: a summary of a stage's set, and samples decoded with their answer tokens marked.

`switchkd inspect`. Samples come from the very encoding that training uses (`ConversationDataset`), after the chat
template, the tokenizer and the cut at max_length, so that a wrong template or mask is seen before it costs a run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchkd.data import ConversationDataset
from switchkd.data.bad_samples import Faults
from switchkd.data.config import DataConfig
from switchkd.data.conversations.encoding import IGNORE
from switchkd.data.conversations.summary import summarise
from switchkd.data.images import load_image
from switchkd.data.sources import load_conversations
from switchkd.models.pair import as_teacher_reads, teacher_processor
from switchkd.models.students import build_processor
from switchkd.tasks.vlm_config import Run
from switchkd.tasks.vlm_rehearsal import rehearse
from switchkd.terminal import printable

OPENS, CLOSES = "\u27e6", "\u27e7"  # around every run of answer tokens; no text of a data set is likely to hold them
STYLES = {"answer": "bold green underline", "image": "magenta", "special": "cyan"}


@dataclass(frozen=True)
class Part:
    """Tokens of one kind that stand together.

    text: as decoded, special tokens included; of image tokens, one of them. answer: whether they are learnt (their
    label is not -100). kind: "text", "special" or "image".
    """

    text: str
    tokens: int
    answer: bool
    kind: str


@dataclass(frozen=True)
class Sample:
    """A training sample.

    place: its number in the set, from 1. images: of each its file, or "in memory", and its size. pixels: the shape that
    the vision tower reads, [images, 3, H, W]; None without images. error: why it cannot be encoded, where it cannot.
    """

    id: str
    place: int
    images: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    pixels: tuple[int, ...] | None = None
    error: str | None = None

    def tokens(self, *, answer: bool | None = None, kind: str | None = None) -> int:
        """How many tokens there are, of those parts."""
        chosen = (part for part in self.parts if answer in (None, part.answer) and kind in (None, part.kind))
        return sum(part.tokens for part in chosen)


@dataclass(frozen=True)
class Inspection:
    """stage: its name. data: its data section. summary: as `summarise` gives it. faults: what is bad, by source,
    samples without an answer token among it."""

    stage: str
    data: DataConfig
    summary: Mapping[str, Any]
    faults: Sequence[Faults]
    samples: Sequence[Sample]


def inspect_data(config: Run, stage: str | None = None, *, samples: int = 3, seed: int = 0) -> Inspection:
    """Reads and checks the training set of one stage (left out, the last) and encodes `samples` of it, picked
    at random by `seed`, in the order of the set.

    Bad samples are counted, however many they are. Raises ValueError for a stage that the configuration does not have,
    for a set without a good sample, and as `load_conversations` for files that cannot be read.
    """
    if config.tiny:
        config = rehearse(config)
    stages = {each.name: each for each in config.stages()}
    stage = config.last.name if stage is None else stage
    if stage not in stages:
        raise ValueError(f"--stage is {stage}, but the run {config.name} has {', '.join(stages)}: give one of them")
    data = stages[stage].data
    student = config.student
    if config.distils:
        student = as_teacher_reads(student, config.teacher, teacher_processor(config.teacher))
    processor = build_processor(student)
    conversations = load_conversations(replace(data, test_split=None)).train
    # Not from the cache of an earlier check: whoever adds a missing image asks here whether it is found.
    workers = min(16, os.cpu_count() or 1)
    dataset = ConversationDataset(conversations, processor, data.max_length, max_bad_rate=1.0, workers=workers)
    picked = sorted(random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset))))
    return Inspection(
        stage,
        data,
        summarise(dataset),
        dataset.faults,
        [read_sample(dataset, index) for index in picked],
    )


def read_sample(dataset: ConversationDataset, index: int) -> Sample:
    """Sample `index` of the set, or why it cannot be encoded."""
    conversation = dataset.conversations[index]
    images = tuple(_image_line(image) for image in conversation.images)
    try:
        encoded = dataset[index]
    except (ValueError, FileNotFoundError) as error:
        return Sample(conversation.id, index + 1, images, error=str(error))
    pixels = tuple(encoded["pixel_values"].shape) if "pixel_values" in encoded else None
    return Sample(conversation.id, index + 1, images, read_parts(encoded, dataset.processor), pixels)


def read_parts(encoded: Mapping[str, Any], processor: Any) -> tuple[Part, ...]:
    """The ids and labels of an encoded sample as parts, in order.

    Decoded as prefixes: a sentencepiece tokenizer drops the space at the start of what it decodes alone.
    """
    tokenizer = processor.tokenizer
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}

    def kind(token: int) -> str:
        if token == processor.image_token_id:
            return "image"
        return "special" if token in special else "text"

    parts, read, before = [], [], ""
    keys = ((label != IGNORE, kind(token), token) for token, label in zip(ids, labels, strict=True))
    for (answer, what), run in groupby(keys, key=lambda each: each[:2]):
        tokens = [token for *_, token in run]
        read += tokens[:1] if what == "image" else tokens
        text = tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(Part(text[len(before) :], len(tokens), answer, what))
        before = text
    return tuple(parts)


def marked(parts: tuple[Part, ...]) -> Text:
    """The decoded text: answers green, underlined and in brackets, image tokens folded, special tokens coloured."""
    text = Text()
    for answer, group in groupby(parts, key=lambda part: part.answer):
        if answer:
            text.append(OPENS, STYLES["answer"])
        for part in group:
            shown = f"({part.text} x {part.tokens})" if part.kind == "image" else printable(part.text)
            text.append(shown, STYLES["answer"] if answer else STYLES.get(part.kind, ""))
        if answer:
            text.append(CLOSES, STYLES["answer"])
    return text


def show(found: Inspection, console: Console) -> None:
    """Prints the summary, then each sample."""
    console.print(_summary(found))
    for faults in found.faults:
        bad = faults.missing + faults.other
        if bad > found.data.max_bad_rate * faults.total:
            rate = f"{bad / faults.total:.2%} of {faults.what} are bad and max_bad_rate is {found.data.max_bad_rate}"
            _warn(console, f"{rate}: training would stop at its start")
    for sample in found.samples:
        _show_sample(sample, found.summary["conversations"], console)
    if found.samples:
        console.print()
        legend = f"{OPENS}learnt{CLOSES}: answer tokens, the only ones with a label; (<image> x N): N image tokens"
        console.print(Text(legend, style="dim"), soft_wrap=True)


def _summary(found: Inspection) -> Table:
    summary, length = found.summary, found.summary["length"]
    table = Table(title=f"stage {found.stage}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in (
        ("conversations", f"{summary['conversations']:,}, with {summary['turns']:,} answers"),
        ("without images", f"{summary['text_only']:,}"),
        ("with one image", f"{summary['one_image']:,}"),
        ("with several images", f"{summary['several_images']:,}"),
        ("missing images", f"{sum(faults.missing for faults in found.faults):,}"),
        ("otherwise bad", f"{sum(faults.other for faults in found.faults):,}"),
        *(("  such as", Text(printable(reason))) for faults in found.faults for reason in faults.reasons),
        ("tokens a sample", f"{length['min']:,} to {length['max']:,}; median {length['median']:,}, 95 % up to "
                            f"{length['p95']:,}"),
        ("cut by max_length", f"{summary['cut']:,} (max_length {found.data.max_length or 'not set'})"),
        ("answer tokens", f"{summary['answer_share']:.1%} of all"),
    ):  # fmt: skip
        table.add_row(label, value)
    return table


def _show_sample(sample: Sample, size: int, console: Console) -> None:
    console.print()
    title = f"sample {sample.place:,} of {size:,}: {printable(sample.id)}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for image in sample.images:
        console.print(Text(f"image: {image}"), soft_wrap=True)
    if sample.error is not None:
        _warn(console, f"it cannot be encoded, training would stop at it: {sample.error}")
        return
    if sample.pixels:
        console.print(Text(f"pixels: {list(sample.pixels)}"))
    total, image, answer = sample.tokens(), sample.tokens(kind="image"), sample.tokens(answer=True)
    console.print(Text(f"tokens: {total:,} = {image:,} image + {total - image - answer:,} prompt + {answer:,} answer"))
    console.print(marked(sample.parts), soft_wrap=True)


def _warn(console: Console, message: str) -> None:
    console.print(Text(f"WARNING: {printable(message)}", style="bold red"), soft_wrap=True)


def _image_line(image: Any) -> str:
    """A file or a picture in memory, and its size."""
    name = "in memory" if isinstance(image, Image.Image) else str(image)
    try:
        width, height = load_image(image).size
    except (ValueError, FileNotFoundError):
        return f"{name}, cannot be read"
    return f"{name}, {width} x {height}"
