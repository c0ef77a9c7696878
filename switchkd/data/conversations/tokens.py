"""The text of a conversation by the chat template, its token ids, and which of them are answers.

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

from switchkd.data.conversations.conversation import IMAGE_MARK, message_text
from switchkd.data.images import load_image

IGNORE = -100  # the label of a position that no loss looks at, as in torch and transformers


def render(conversations: list[list[dict]], processor: Any, where: str, *, prompt: bool = False) -> list[str]:
    """The text of each list of messages."""
    try:
        return processor.apply_chat_template(conversations, add_generation_prompt=prompt, tokenize=False)
    # TemplateError: also what a template's own raise_exception gives. The others come from its expressions.
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(
            f"{where}: the chat template cannot render it ({type(error).__name__}: {error}); correct the roles and"
            " their order to what the template takes, or use a template that takes content as a list of items"
        ) from error


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's special tokens by their ids: those of its roles, and those among its added tokens too that no
    role names, as `<|end|>` of Phi-3."""
    added = {row: token.content for row, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def refuse_special_tokens(messages: list[dict], processor: Any, where: str) -> None:
    """A text that spells a special token would end its turn or begin another; `check_messages` counts image marks."""
    special = set(special_tokens(processor.tokenizer).values()) - {IMAGE_MARK}
    for message in messages:
        text = message_text(message)
        if found := sorted(token for token in special if token in text):
            raise ValueError(
                f"{where}: the text of its {message['role']} message holds {found[0]!r}, a special token of the"
                " tokenizer, which would forge a turn; write it differently or remove the conversation"
            )


def refuse_slow(processor: Any) -> None:
    """Raises ValueError for a tokenizer without character offsets."""
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"{type(processor.tokenizer).__name__} gives no character offsets; load a tokenizer with a tokenizer.json"
            " (a fast one)"
        )


def answer_spans(messages: list[dict], processor: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and for each assistant turn its (start, end) characters counted without image marks.

    Image marks are left out of the count because their length changes when the processor expands them. A span holds
    the answer, white space and the special tokens that end it; ValueError where the template writes more into it.
    """
    refuse_slow(processor)
    refuse_special_tokens(messages, processor, where)
    mark, special = processor.image_token, special_tokens(processor.tokenizer).values()
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    uptos = [messages[: index + 1] for index in answers]
    # The last answer ends the whole text, unless a question without an answer follows it.
    uptos = render(uptos if uptos and len(uptos[-1]) == len(messages) else [*uptos, messages], processor, where)
    text = uptos[-1]
    befores = render([messages[:index] for index in answers], processor, where, prompt=True) if answers else []
    spans = []
    for index, before, upto in zip(answers, befores, uptos, strict=False):
        if not (text.startswith(upto) and upto.startswith(before)):
            raise ValueError(
                f"{where}: the chat template is not prefix-stable: it renders the first {index + 1} messages"
                " differently from the same messages in the whole conversation, which hides the answers;"
                " use a template that writes each turn independently of later ones"
            )
        _refuse_template_text(upto[len(before) :], messages[index], mark, special, where)
        # White space after the end-of-turn token belongs to the template, not to the answer.
        start, end = len(before), len(upto.rstrip())
        spans.append((start - before.count(mark) * len(mark), end - upto.count(mark) * len(mark)))
    return text, spans


def _refuse_template_text(written: str, answer: dict, mark: str, special: Iterable[str], where: str) -> None:
    """ValueError where `written`, what the template makes of an answer after its prompt, holds text of its own: that
    would be learnt as part of the answer, while judging does not write it into the prompt. `special`: the special
    tokens' texts."""
    texts = [item["text"] for item in answer["content"] if item["type"] == "text"]
    rest = written
    for piece in (part.strip() for text in texts for part in text.split(IMAGE_MARK)):
        rest = _without_space(rest, mark)
        if not rest.startswith(piece):
            found = rest.partition(piece)[0] if piece in rest else rest
            raise ValueError(
                f"{where}: the chat template writes {found[:60]!r} between the prompt and the answer {piece[:40]!r},"
                " which would be learnt as part of the answer and is not there when a question is asked; let it write"
                " that text in its add_generation_prompt block"
            )
        rest = rest[len(piece) :]
    rest = whole = _without_space(rest, mark).rstrip()
    while end := next((token for token in special if rest.endswith(token)), None):
        rest = rest.removesuffix(end).rstrip()
    if rest and rest != whole:  # without any special token at the end, `answer_labels` says what is wrong
        end = whole.removeprefix(rest).strip()
        raise ValueError(
            f"{where}: the chat template writes {rest[:60]!r} between the answer and {end!r}, which would be learnt as"
            " part of every answer; take it out of the template"
        )


def _without_space(text: str, mark: str) -> str:
    """The text without the white space and image marks that it begins with."""
    text = text.lstrip()
    while text.startswith(mark):
        text = text.removeprefix(mark).lstrip()
    return text


def tokenize(text: str, processor: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Ids [T] and offsets [T, 2] of a text whose image marks are not expanded, as `process` gives them."""
    encoded = processor.tokenizer(
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        add_special_tokens=_adds_special_tokens(text, processor.tokenizer),
    )
    # By way of numpy: torch reads a long list many times more slowly.
    offsets = np.fromiter(chain.from_iterable(encoded["offset_mapping"]), np.int64).reshape(-1, 2)
    length = _text_length(encoded["special_tokens_mask"])
    return torch.from_numpy(np.array(encoded["input_ids"][:length], np.int64)), offsets[:length]


def check_marks(text: str, images: Sequence, processor: Any, where: str) -> None:
    """ValueError where the template wrote another number of image marks than there are images."""
    marks = text.count(processor.image_token)
    if marks != len(images):
        raise ValueError(
            f"{where}: the chat template wrote {marks} {processor.image_token} marks for {len(images)}"
            " images; use a template that writes one for each image"
        )


def process(
    text: str, images: Sequence, processor: Any, where: str, *, return_offsets_mapping: bool = False
) -> dict[str, torch.Tensor]:
    """The processor's input_ids [T], and if asked or there offset_mapping [T, 2] and pixel_values.

    What the tokenizer itself adds after a text (`<s> $A </s>`) is left out: no answer could follow it.
    """
    check_marks(text, images, processor, where)
    try:
        pictures = [load_image(image) for image in images]
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from error
    encoded = processor(
        text=[text],
        images=pictures or None,
        return_tensors="pt",
        return_offsets_mapping=return_offsets_mapping,
        return_special_tokens_mask=True,
        add_special_tokens=_adds_special_tokens(text, processor.tokenizer),
    )
    length = _text_length(encoded["special_tokens_mask"][0].tolist())
    kept = {name: encoded[name][0][:length] for name in ("input_ids", "offset_mapping") if name in encoded}
    if pictures:
        kept["pixel_values"] = encoded["pixel_values"]
    return kept


def text_ids(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of a text as `process` gives them, and those that the tokenizer would add after it."""
    encoded = tokenizer(text, return_special_tokens_mask=True, add_special_tokens=_adds_special_tokens(text, tokenizer))
    length = _text_length(encoded["special_tokens_mask"])
    return encoded["input_ids"][:length], encoded["input_ids"][length:]


def _text_length(special_tokens_mask: list[int]) -> int:
    """How many ids there are up to the last that the tokenizer did not add by itself."""
    length = len(special_tokens_mask)
    while length and special_tokens_mask[length - 1]:
        length -= 1
    return length


def _adds_special_tokens(text: str, tokenizer: Any) -> bool:
    # As transformers' processor.apply_chat_template: a template that writes the start token must not get two.
    bos = tokenizer.bos_token
    return not (bos and text.startswith(bos))


def answer_labels(
    ids: torch.Tensor, offsets: np.ndarray, spans: list[tuple[int, int]], processor: Any, where: str
) -> torch.Tensor:
    """Labels [T]: the id at every answer position, -100 elsewhere.

    ids [T] with the character `offsets` [T, 2] of each, and `spans` as `answer_spans` counts them.
    """
    rows = ids.numpy()
    is_image = rows == processor.image_token_id
    passed = is_image.cumsum() * len(processor.image_token)  # characters of image marks up to here
    starts, ends = (offsets - passed[:, None]).T
    text_token = ~is_image & (ends > starts)
    labels = np.full_like(rows, IGNORE)
    special = special_tokens(processor.tokenizer)
    for start, end in spans:
        if (text_token & (starts < start) & (ends > start)).any():
            raise ValueError(
                f"{where}: an answer begins inside a token that starts in the prompt, so that no generated"
                " answer could begin like it; strip the answer, or end the template's prompt elsewhere"
            )
        answer = (text_token & (starts >= start) & (starts < end)).nonzero()[0]
        last = int(rows[answer[-1]]) if len(answer) else None
        if last not in special:
            found = "no token" if last is None else repr(processor.tokenizer.decode([last]))
            raise ValueError(
                f"{where}: the chat template ends an answer with {found} instead of a special end-of-turn"
                " token, so that a model never learns to stop; let it write the eos token after each answer"
            )
        labels[answer] = rows[answer]
    labels[0] = IGNORE
    return torch.from_numpy(labels)


def cut(encoded: dict[str, Any], processor: Any, max_length: int | None, where: str) -> None:
    """Shorten the input_ids and labels of `encoded` to `max_length`.

    Raises ValueError when that cuts image tokens or leaves no answer token.
    """
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
