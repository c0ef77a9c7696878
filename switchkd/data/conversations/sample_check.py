"""The check of all samples before training: which are good, and how long they are."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from switchkd.data.bad_samples import Faults, check_rate, logger
from switchkd.data.conversations.check_cache import CheckOutcome, load_outcome, outcome_key, save_outcome
from switchkd.data.conversations.conversation import Conversation, check_conversation
from switchkd.data.conversations.tokens import (
    IGNORE,
    answer_labels,
    answer_spans,
    check_marks,
    cut,
    process,
    refuse_slow,
    render,
    text_ids,
    tokenize,
)

LARGE = 10_000  # conversations from which on a progress bar, and workers, are worth it
AT_ONCE = 250

UNNAMED = "training conversations"


class Checked(NamedTuple):
    """What the check of one conversation found; `fault` and `missing` for a bad one, with lengths of 0."""

    length: int = 0
    answer_length: int = 0
    cut: bool = False
    fault: str = ""
    missing: bool = False


class SampleCheck:
    """Finds what `encode` would: the lengths of a conversation's sample, or its error.

    The image files are opened but not all decoded (`check_conversation`), and the image tokens are counted, not
    written: every image of a LLaVA processor takes the same number of tokens, measured once. 1 to 2 ms a
    conversation.
    """

    def __init__(self, processor: Any, max_length: int | None = None):
        refuse_slow(processor)
        self.processor = processor
        self.max_length = max_length
        blank = Image.new("RGB", (64, 64))
        ids = process(processor.image_token, [blank], processor, "a blank image")["input_ids"]
        self.tokens_an_image = int((ids == processor.image_token_id).sum())

    def __call__(self, conversation: Conversation) -> Checked:
        """Raises ValueError and FileNotFoundError as `encode` and `check_conversation`."""
        check_conversation(conversation)
        where = f"conversation {conversation.id!r}"
        text, spans = answer_spans(conversation.messages, self.processor, where)
        check_marks(text, conversation.images, self.processor, where)
        ids, offsets = tokenize(text, self.processor)
        labels = answer_labels(ids, offsets, spans, self.processor, where)
        # Only the length is asked for: far cheaper than tokenizing the expanded text.
        sample = {"input_ids": ids, "labels": labels}
        is_image = ids == self.processor.image_token_id
        whole = len(ids) + int(is_image.sum()) * (self.tokens_an_image - 1)
        is_cut = self.max_length is not None and whole > self.max_length
        if is_cut:
            repeats = torch.where(is_image, self.tokens_an_image, 1)
            sample = {name: row.repeat_interleave(repeats) for name, row in sample.items()}
        cut(sample, self.processor, self.max_length if is_cut else None, where)
        length = self.max_length if is_cut else whole
        return Checked(length, int((sample["labels"] != IGNORE).sum()), is_cut)


def check_samples(
    conversations: Sequence[Conversation],
    processor: Any,
    max_length: int | None,
    *,
    max_bad_rate: float,
    cache: Path | None = None,
    workers: int = 0,
) -> CheckOutcome:
    """`SampleCheck` of every conversation, with up to `max_bad_rate` (0 to 1) bad ones of each source reported.

    With 0 the first bad one is the error. `cache` and `workers` as in `ConversationDataset`. Raises ValueError past
    the rate.
    """
    check_rate(max_bad_rate)
    check = SampleCheck(processor, max_length)
    key = cache and outcome_key(conversations, processor, check.tokens_an_image, max_length)
    outcome = cache and load_outcome(cache, key, len(conversations))
    if outcome and not _as_before(conversations, outcome, check):
        logger.warning("images have come or gone since an earlier start: all samples are checked again")
        outcome = None
    if outcome is None:
        outcome = _outcome(conversations, _checked(conversations, check, workers), first_ends=max_bad_rate == 0)
        if cache is not None:
            save_outcome(cache, key, outcome)
    for faults in outcome.faults:
        faults.report(max_bad_rate)
    good = next((each for each, length in zip(conversations, outcome.lengths, strict=True) if length), None)
    if good is not None:
        _report_added_ends(good, processor)
    if outcome.cut:
        logger.warning(
            "max_length=%s cuts the end of %s of %s samples", max_length, f"{outcome.cut:,}", f"{len(conversations):,}"
        )
    return outcome


def _report_added_ends(conversation: Conversation, processor: Any) -> None:
    tokenizer = processor.tokenizer
    (text,) = render([conversation.messages], processor, f"conversation {conversation.id!r}")
    if added := text_ids(text, tokenizer)[1]:
        logger.warning(
            "the tokenizer adds %s after each text, which is left out here, in training and judging; the stock "
            "processor puts it behind every prompt, where no answer can follow: take it out of the post_processor of "
            "tokenizer.json (add_eos_token in tokenizer_config.json)",
            " ".join(tokenizer.convert_ids_to_tokens(added)),
        )


def _as_before(conversations: Sequence[Conversation], outcome: CheckOutcome, check: SampleCheck) -> bool:
    """Whether what an earlier check found bad still is, and the image files of the rest are there."""
    bad = []
    for conversation, length in zip(conversations, outcome.lengths, strict=True):
        if length == 0:
            bad.append(conversation)
        elif not all(os.path.isfile(image) for image in conversation.images if isinstance(image, str | Path)):
            return False
    chunks = _Chunks(bad, check)
    return all(found.fault for index in range(len(chunks)) for found in chunks[index])


def _outcome(conversations: Sequence[Conversation], found: Iterable[Checked], first_ends: bool) -> CheckOutcome:
    lengths, answer_lengths, cut_samples = [], [], 0
    faults: dict[str, Faults] = {}
    for conversation, checked in zip(conversations, found, strict=True):
        name = conversation.source or UNNAMED
        of_source = faults.setdefault(name, Faults(name))
        of_source.total += 1
        if checked.fault:
            if first_ends:
                raise (FileNotFoundError if checked.missing else ValueError)(checked.fault)
            of_source.add(checked.fault, missing=checked.missing)
        lengths.append(checked.length)
        answer_lengths.append(checked.answer_length)
        cut_samples += checked.cut
    return CheckOutcome(lengths, answer_lengths, cut_samples, list(faults.values()))


def _checked(conversations: Sequence[Conversation], check: SampleCheck, workers: int) -> Iterator[Checked]:
    chunks = _Chunks(conversations, check)
    large = len(conversations) >= LARGE
    if shared := large and workers > 0:
        gc.freeze()  # or each worker's collector would touch, and so copy, all conversations
        # A generator of its own: the loader draws a seed, which must not move torch's global state.
        found = DataLoader(
            chunks, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
        )
    else:
        found = (chunks[index] for index in range(len(chunks)))
    main = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        with tqdm(
            total=len(conversations), desc="checking samples", unit="sample", disable=not (large and main)
        ) as bar:
            for chunk in found:
                yield from chunk
                bar.update(len(chunk))
    finally:
        if shared:
            gc.unfreeze()


class _Chunks(Dataset):
    def __init__(self, conversations: Sequence[Conversation], check: SampleCheck):
        self.conversations = conversations
        self.check = check

    def __len__(self) -> int:
        return -(-len(self.conversations) // AT_ONCE)

    def __getitem__(self, index: int) -> list[Checked]:
        return [self._one(each) for each in self.conversations[index * AT_ONCE : (index + 1) * AT_ONCE]]

    def _one(self, conversation: Conversation) -> Checked:
        try:
            return self.check(conversation)
        except (ValueError, FileNotFoundError) as error:
            return Checked(fault=str(error), missing=isinstance(error, FileNotFoundError))


def _as_it_is(chunk: list[Checked]) -> list[Checked]:
    return chunk
