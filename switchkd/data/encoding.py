"""Conversations -> token ids, answer labels and pixels; batches of them.

The chat template and the expansion of image marks are the processor's own. The answer positions come from
character offsets of the text that the template renders, never from splitting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from switchkd.data.bad_samples import keep_good
from switchkd.data.conversations import Conversation, check_conversation, check_messages
from switchkd.data.images import load_image

IGNORE = -100  # the label of a position that no loss looks at, as in torch and transformers


def encode(conversation: Conversation, processor: Any, max_length: int | None = None) -> dict[str, Any]:
    """One conversation as a training sample.

    Returns input_ids [T]; labels [T], the id at every answer position of every assistant turn, its
    end-of-turn token included, and -100 elsewhere, at position 0 always; pixel_values [images, 3, H, W],
    absent without images; sample_id. Ids past `max_length` are cut.

    Raises ValueError, naming the conversation, where `check_messages` or `load_image` do, for a chat template
    that renders the start of a conversation differently from the whole or does not end an answer with a
    special token, for an answer that shares a token with the prompt, and when `max_length` cuts image tokens
    or leaves no answer token. FileNotFoundError for a missing image.
    """
    where = f"conversation {conversation.id!r}"
    check_messages(conversation.messages, conversation.images, where)
    text, spans = _answer_spans(conversation.messages, processor, where)
    encoded = _process(text, conversation.images, processor, where, return_offsets_mapping=True)
    encoded["labels"] = _labels(encoded["input_ids"], encoded.pop("offset_mapping"), spans, processor, where)
    _cut(encoded, processor, max_length, where)
    encoded["sample_id"] = conversation.id
    return encoded


def encode_prompt(messages: list[dict], images: Sequence, processor: Any) -> dict[str, Any]:
    """The same without labels and sample_id, ending in the generation prompt: what `generate` continues.

    Its ids are the first ids of the training sample of the same conversation. Raises as `encode`.
    """
    images = list(images)
    check_messages(messages, images, "prompt")
    return _process(_render(messages, processor, prompt=True), images, processor, "prompt")


class ConversationDataset(torch.utils.data.Dataset):
    """Conversations, encoded when they are asked for (`list(dataset)` keeps a small set encoded in memory).

    Every conversation and image file is checked first (`check_conversation`), and its answer positions are
    found from the text alone. Bad ones are counted, reported and skipped up to the share `max_bad_rate` (0 to
    1); past it, ValueError. What only shows in decoding a picture is raised by __getitem__, by sample name.
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
        return encode(self.conversations[index], self.processor, self.max_length)

    def _check(self, conversation: Conversation) -> Conversation:
        check_conversation(conversation)
        where = f"conversation {conversation.id!r}"
        text, spans = _answer_spans(conversation.messages, self.processor, where)
        if conversation.images:
            # Every image of a LLaVA processor takes the same number of tokens: measured once.
            if self._tokens_an_image is None:
                mark = self.processor.image_token
                alone = _process(mark, conversation.images[:1], self.processor, where)["input_ids"]
                self._tokens_an_image = int((alone == self.processor.image_token_id).sum())
            text = text.replace(self.processor.image_token, self.processor.image_token * self._tokens_an_image)
        encoded = _tokenize(text, self.processor)
        encoded["labels"] = _labels(encoded["input_ids"], encoded["offset_mapping"], spans, self.processor, where)
        _cut(encoded, self.processor, self.max_length, where)
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


def _render(messages: list[dict], processor: Any, *, prompt: bool = False) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def _answer_spans(messages: list[dict], processor: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and for each assistant turn its (start, end) characters counted without image marks.

    Image marks are left out of the count because their length changes when the processor expands them.
    """
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"{where}: {type(processor.tokenizer).__name__} gives no character offsets;"
            " load a tokenizer with a tokenizer.json (a fast one)"
        )
    mark = processor.image_token
    text = _render(messages, processor)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], processor, prompt=True)
        upto = _render(messages[: index + 1], processor) if index + 1 < len(messages) else text
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


def _tokenize(text: str, processor: Any) -> dict[str, torch.Tensor]:
    tokenizer = processor.tokenizer
    encoded = tokenizer(
        [text],
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=_adds_special_tokens(text, processor),
    )
    return {name: encoded[name][0] for name in ("input_ids", "offset_mapping")}


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
    ids: torch.Tensor, offsets: torch.Tensor, spans: list[tuple[int, int]], processor: Any, where: str
) -> torch.Tensor:
    is_image = (ids == processor.image_token_id).numpy()
    passed = is_image.cumsum() * len(processor.image_token)  # characters of image marks up to here
    starts, ends = (offsets.numpy() - passed[:, None]).T
    text_token = ~is_image & (ends > starts)
    labels = torch.full_like(ids, IGNORE)
    for start, end in spans:
        if (text_token & (starts < start) & (ends > start)).any():
            raise ValueError(
                f"{where}: an answer begins inside a token that starts in the prompt, so that no generated"
                " answer could begin like it; strip the answer, or end the template's prompt elsewhere"
            )
        answer = (text_token & (starts >= start) & (starts < end)).nonzero()[0]
        last = int(ids[answer[-1]]) if len(answer) else None
        if last not in processor.tokenizer.all_special_ids:
            found = "no token" if last is None else repr(processor.tokenizer.decode([last]))
            raise ValueError(
                f"{where}: the chat template ends an answer with {found} instead of a special end-of-turn"
                " token, so that a model never learns to stop; let it write the eos token after each answer"
            )
        labels[answer] = ids[answer]
    labels[0] = IGNORE
    return labels


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
