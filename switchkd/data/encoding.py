"""Conversations -> token ids, answer labels and pixels; batches of them.

The chat template and the expansion of image marks are the processor's own. The answer positions come from
character offsets of the text that the template renders, never from splitting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from switchkd.data.bad_samples import keep_good
from switchkd.data.conversations import IMAGE_MARK, Conversation, check_conversation, check_messages, message_text
from switchkd.data.images import load_image

IGNORE = -100  # the label of a position that no loss looks at, as in torch and transformers


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
    text, spans = _answer_spans(conversation.messages, processor, where)
    encoded = _process(text, conversation.images, processor, where, return_offsets_mapping=True)
    encoded["labels"] = _labels(encoded["input_ids"], encoded.pop("offset_mapping").numpy(), spans, processor, where)
    _cut(encoded, processor, max_length, where)
    encoded["sample_id"] = conversation.id
    return encoded


def encode_prompt(messages: list[dict], images: Sequence, processor: Any) -> dict[str, Any]:
    """The same without labels and sample_id, ending in the generation prompt: what `generate` continues.

    Its ids are the first ids of the training sample of the same conversation. Raises as `encode`.
    """
    images = list(images)
    check_messages(messages, images, "prompt")
    _refuse_special_tokens(messages, processor, "prompt")
    (text,) = _render([messages], processor, "prompt", prompt=True)
    return _process(text, images, processor, "prompt")


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations, encoded when they are asked for (`list(dataset)` keeps a small set encoded in memory).

    Every conversation and image file is checked first (`check_conversation`), and its answer positions are
    found from the text alone. Bad ones are counted, reported and skipped up to the share `max_bad_rate` (0 to
    1); past it, ValueError. What only shows in decoding a picture is raised by __getitem__, by sample name:
    damage inside a JPEG, or a file that has changed since.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        processor: Any,
        max_length: int | None = None,
        max_bad_rate: float = 0.01,
    ):
        self.processor = processor
        self.max_length = max_length
        self._tokens_an_image: int | None = None
        self.conversations = keep_good(
            conversations, self._check, max_bad_rate=max_bad_rate, what="training conversations"
        )

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return encode(self.conversations[index], self.processor, self.max_length)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(
                f"{error}. It passed the check of all samples, which does not decode every picture, so that"
                " max_bad_rate does not skip it"
            ) from error

    def _check(self, conversation: Conversation) -> Conversation:
        check_conversation(conversation)
        where = f"conversation {conversation.id!r}"
        text, spans = _answer_spans(conversation.messages, self.processor, where)
        ids, offsets = _tokenize(text, self.processor)
        labels = _labels(ids, offsets, spans, self.processor, where)
        if conversation.images:
            # Every image of a LLaVA processor takes the same number of tokens: measured once.
            if self._tokens_an_image is None:
                mark = self.processor.image_token
                alone = _process(mark, conversation.images[:1], self.processor, where)["input_ids"]
                self._tokens_an_image = int((alone == self.processor.image_token_id).sum())
            # Only the length is asked for: far cheaper than tokenizing the expanded text.
            repeats = torch.where(ids == self.processor.image_token_id, self._tokens_an_image, 1)
            ids, labels = ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)
        _cut({"input_ids": ids, "labels": labels}, self.processor, self.max_length, where)
        return conversation


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


def _render(conversations: list[list[dict]], processor: Any, where: str, *, prompt: bool = False) -> list[str]:
    """The text of each list of messages."""
    try:
        return processor.apply_chat_template(conversations, add_generation_prompt=prompt, tokenize=False)
    # TemplateError: also what a template's own raise_exception gives. The others come from its expressions.
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(
            f"{where}: the chat template cannot render it ({type(error).__name__}: {error}); correct the roles and"
            " their order to what the template takes, or use a template that takes content as a list of items"
        ) from error


def _refuse_special_tokens(messages: list[dict], processor: Any, where: str) -> None:
    """A text that spells a special token would end its turn or begin another; `check_messages` counts image marks."""
    tokenizer = processor.tokenizer
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = added.union(tokenizer.all_special_tokens) - {IMAGE_MARK}
    for message in messages:
        text = message_text(message)
        if found := sorted(token for token in special if token in text):
            raise ValueError(
                f"{where}: the text of its {message['role']} message holds {found[0]!r}, a special token of the"
                " tokenizer, which would forge a turn; write it differently or remove the conversation"
            )


def _answer_spans(messages: list[dict], processor: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and for each assistant turn its (start, end) characters counted without image marks.

    Image marks are left out of the count because their length changes when the processor expands them.
    """
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"{where}: {type(processor.tokenizer).__name__} gives no character offsets;"
            " load a tokenizer with a tokenizer.json (a fast one)"
        )
    _refuse_special_tokens(messages, processor, where)
    mark = processor.image_token
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    *uptos, text = _render([*(messages[: index + 1] for index in answers), messages], processor, where)
    befores = _render([messages[:index] for index in answers], processor, where, prompt=True) if answers else []
    spans = []
    for index, before, upto in zip(answers, befores, uptos, strict=True):
        if not (text.startswith(upto) and upto.startswith(before)):
            raise ValueError(
                f"{where}: the chat template is not prefix-stable: it renders the first {index + 1} messages"
                " differently from the same messages in the whole conversation, which hides the answers;"
                " use a template that writes each turn independently of later ones"
            )
        # White space after the end-of-turn token belongs to the template, not to the answer.
        start, end = len(before), len(upto.rstrip())
        spans.append((start - before.count(mark) * len(mark), end - upto.count(mark) * len(mark)))
    return text, spans


def _tokenize(text: str, processor: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Ids [T] and offsets [T, 2] of a text whose image marks are not expanded."""
    encoded = processor.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=_adds_special_tokens(text, processor)
    )
    # By way of numpy: torch reads a long list many times more slowly.
    offsets = np.fromiter(chain.from_iterable(encoded["offset_mapping"]), np.int64)
    return torch.from_numpy(np.array(encoded["input_ids"], np.int64)), offsets.reshape(-1, 2)


def _process(
    text: str, images: Sequence, processor: Any, where: str, *, return_offsets_mapping: bool = False
) -> dict[str, torch.Tensor]:
    """The processor's input_ids [T], and if asked or there offset_mapping [T, 2] and pixel_values."""
    marks = text.count(processor.image_token)
    if marks != len(images):
        raise ValueError(
            f"{where}: the chat template wrote {marks} {processor.image_token} marks for {len(images)}"
            " images; use a template that writes one for each image"
        )
    try:
        pictures = [load_image(image) for image in images]
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error
    encoded = processor(
        text=[text],
        images=pictures or None,
        return_tensors="pt",
        return_offsets_mapping=return_offsets_mapping,
        add_special_tokens=_adds_special_tokens(text, processor),
    )
    kept = {name: encoded[name][0] for name in ("input_ids", "offset_mapping") if name in encoded}
    if pictures:
        kept["pixel_values"] = encoded["pixel_values"]
    return kept


def _adds_special_tokens(text: str, processor: Any) -> bool:
    # As transformers' processor.apply_chat_template: a template that writes the start token must not get two.
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _labels(
    ids: torch.Tensor, offsets: np.ndarray, spans: list[tuple[int, int]], processor: Any, where: str
) -> torch.Tensor:
    rows = ids.numpy()
    is_image = rows == processor.image_token_id
    passed = is_image.cumsum() * len(processor.image_token)  # characters of image marks up to here
    starts, ends = (offsets - passed[:, None]).T
    text_token = ~is_image & (ends > starts)
    labels = np.full_like(rows, IGNORE)
    for start, end in spans:
        if (text_token & (starts < start) & (ends > start)).any():
            raise ValueError(
                f"{where}: an answer begins inside a token that starts in the prompt, so that no generated"
                " answer could begin like it; strip the answer, or end the template's prompt elsewhere"
            )
        answer = (text_token & (starts >= start) & (starts < end)).nonzero()[0]
        last = int(rows[answer[-1]]) if len(answer) else None
        if last not in processor.tokenizer.all_special_ids:
            found = "no token" if last is None else repr(processor.tokenizer.decode([last]))
            raise ValueError(
                f"{where}: the chat template ends an answer with {found} instead of a special end-of-turn"
                " token, so that a model never learns to stop; let it write the eos token after each answer"
            )
        labels[answer] = rows[answer]
    labels[0] = IGNORE
    return torch.from_numpy(labels)


def _cut(encoded: dict[str, Any], processor: Any, max_length: int | None, where: str) -> None:
    length = len(encoded["input_ids"])
    if max_length is not None and length > max_length:
        if bool((encoded["input_ids"][max_length:] == processor.image_token_id).any()):
            raise ValueError(
                f"{where}: max_length={max_length} cuts image tokens of a sample of {length} ids;"
                " raise max_length or give it fewer images"
            )
        encoded["input_ids"], encoded["labels"] = (
            encoded["input_ids"][:max_length],
            encoded["labels"][:max_length],
        )
    if bool((encoded["labels"] == IGNORE).all()):
        why = "it has no assistant turn" if length == len(encoded["labels"]) else f"max_length={max_length}"
        raise ValueError(
            f"{where}: no answer token is left of {length} ids ({why});"
            " raise max_length, shorten the question or give it an answer"
        )
