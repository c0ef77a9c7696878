"""Conversations -> token ids, answer labels and pixels; batches of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from switchkd.data.conversations.conversation import Conversation, check_messages
from switchkd.data.conversations.sample_check import check_samples
from switchkd.data.conversations.tokens import (
    IGNORE,
    answer_labels,
    answer_spans,
    cut,
    process,
    refuse_special_tokens,
    render,
)
from switchkd.digest import digest


def encode(conversation: Conversation, processor: Any, max_length: int | None = None) -> dict[str, Any]:
    """One conversation as a training sample.

    Returns input_ids [T]; labels [T], the id at every answer position of every assistant turn, its
    end-of-turn token included, and -100 elsewhere, at position 0 always; pixel_values [images, 3, H, W],
    absent without images; sample_id. Ids past `max_length` are cut.

    Raises ValueError, naming the conversation, where `check_messages` or `load_image` do, for a text that holds a
    special token of the tokenizer, for a chat template that cannot render the conversation, renders its start
    differently from the whole or does not end an answer with a special token, for an answer that shares a token
    with the prompt, and when `max_length` cuts image tokens or leaves no answer token. FileNotFoundError for a
    missing image.
    """
    where = f"conversation {conversation.id!r}"
    check_messages(conversation.messages, conversation.images, where)
    text, spans = answer_spans(conversation.messages, processor, where)
    encoded = process(text, conversation.images, processor, where, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping").numpy()
    encoded["labels"] = answer_labels(encoded["input_ids"], offsets, spans, processor, where)
    cut(encoded, processor, max_length, where)
    encoded["sample_id"] = conversation.id
    return encoded


def encode_prompt(messages: list[dict], images: Sequence, processor: Any) -> dict[str, Any]:
    """The same without labels and sample_id, ending in the generation prompt: what `generate` continues.

    Its ids are the first ids of the training sample of the same conversation. Raises as `encode`.
    """
    images = list(images)
    check_messages(messages, images, "prompt")
    refuse_special_tokens(messages, processor, "prompt")
    (text,) = render([messages], processor, "prompt", prompt=True)
    return process(text, images, processor, "prompt")


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations, encoded when they are asked for (`list(dataset)` keeps a small set encoded in memory).

    Every conversation and image file is checked first (`SampleCheck`), without decoding most pictures. Bad ones are
    counted for each `source`, reported and skipped up to the share `max_bad_rate` (0 to 1) of each; past it,
    ValueError. What only shows in decoding a picture is raised by __getitem__, by sample name: damage inside a JPEG,
    or a file that has changed since.

    cache: a folder that keeps what the check found, so that the next start on the same conversations, tokenizer,
        chat template, tokens an image and max_length takes it from there and reports it again. Image files are
        known by their paths: one that was added, removed or changed since is not noticed until it is read.
    workers: processes that share the check of 10,000 conversations or more; 0 is this one alone.

    conversations: those that are kept. lengths: ids of each sample, image tokens expanded, after the cut to
    `max_length`. answer_lengths: its answer tokens among them. cut: how many samples `max_length` shortens.
    faults: what was found bad, for each source.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        processor: Any,
        max_length: int | None = None,
        max_bad_rate: float = 0.01,
        *,
        cache: Path | None = None,
        workers: int = 0,
    ):
        self.processor = processor
        self.max_length = max_length
        conversations = list(conversations)
        found = check_samples(
            conversations, processor, max_length, max_bad_rate=max_bad_rate, cache=cache, workers=workers
        )
        # A length of 0 is a bad sample's.
        self.conversations = [each for each, length in zip(conversations, found.lengths, strict=True) if length]
        self.lengths = [length for length in found.lengths if length]
        self.answer_lengths = [length for length in found.answer_lengths if length]
        self.cut = found.cut
        self.faults = found.faults

    def __len__(self) -> int:
        return len(self.conversations)

    def identity(self) -> dict[str, dict[str, Any]]:
        """What tells these samples from others when a run is resumed: their number, hashes of their ids and of their
        messages. Images are not read."""
        texts = ([(m["role"], [i.get("text") for i in m["content"]]) for m in c.messages] for c in self.conversations)
        ids = digest(each.id.encode() for each in self.conversations)
        return {
            "data": {"samples": len(self), "hash of the sample ids": ids},
            "messages": {"hash of the messages": digest(json.dumps(text).encode() for text in texts)},
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return encode(self.conversations[index], self.processor, self.max_length)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(
                f"{error}. It passed the check of all samples, which does not decode every picture, so that"
                " max_bad_rate does not skip it"
            ) from error


class Collator:
    """Encoded samples -> one batch: input_ids, attention_mask, labels [B, T], pixel_values [images, 3, H, W].

    Ids are padded with `pad_token_id`, labels with -100, on the right; padding_side="left" is for generation.
    pixel_values holds the images of all samples in their order and is absent where none has one; labels are
    absent for prompts. keep_sample_id=True adds the list `sample_id`.
    """

    def __init__(self, pad_token_id: int, *, padding_side: str = "right", keep_sample_id: bool = False):
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} must be 'right' or 'left'")
        if pad_token_id is None:
            raise ValueError("pad_token_id is None: set tokenizer.pad_token to a token that no answer holds")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.keep_sample_id = keep_sample_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = self._pad([sample["labels"] for sample in samples], IGNORE)
        pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if self.keep_sample_id:
            batch["sample_id"] = [sample["sample_id"] for sample in samples]
        return batch

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)
