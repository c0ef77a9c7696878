"""A conversation about images, and what makes it one that can be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from switchkd.data.bad_samples import keep_good
from switchkd.data.images import StoredImage, check_image

IMAGE_MARK = "<image>"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One or more turns about some images.

    messages: chat form of Hugging Face, [{"role": "user", "content": [{"type": "image"}, {"type": "text",
        "text": ...}]}, {"role": "assistant", "content": [...]}, ...]; the content is always a list.
    images: one file path or picture for each {"type": "image"}, in their order.
    kind: the kind of question ("exists", "locate", ...), for judging kind by kind; "" for none.
    source: the file it was read from, by which bad samples are counted; "" for none.
    """

    id: str
    messages: list[dict]
    images: list[Path | StoredImage | Image.Image]
    kind: str = ""
    source: str = ""

    @property
    def question(self) -> str:
        """The text of the last user message, "" for none."""
        return self._last("user")

    @property
    def answer(self) -> str:
        """The text of the last assistant message, "" for none."""
        return self._last("assistant")

    def _last(self, role: str) -> str:
        return next((message_text(each) for each in reversed(self.messages) if each["role"] == role), "")


def message_text(message: dict) -> str:
    """The text items of a message, joined and stripped."""
    return "".join(item["text"] for item in message["content"] if item["type"] == "text").strip()


def check_messages(messages: list[dict], images: list, where: str) -> None:
    """The structure of a conversation named `where`, without opening a file.

    Raises ValueError for an unknown role or content, an empty answer, and a number of images that differs
    from the image items; a text that spells the image mark counts as one: the processor would expand it.
    """
    marks = 0
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}: unknown role {message.get('role')!r}; known roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), list):
            raise ValueError(f"{where}: the content of a {message['role']} message must be a list of items")
        for item in message["content"]:
            known = item.get("type") if isinstance(item, dict) else None
            if known == "image":
                marks += 1
            elif known == "text" and isinstance(item.get("text"), str):
                marks += item["text"].count(IMAGE_MARK)
                if LONE_SURROGATE.search(item["text"]):
                    raise ValueError(f"{where}: its text holds half a character (a lone surrogate): correct it")
            else:
                raise ValueError(
                    f'{where}: unknown content item {item!r}; known are {{"type": "image"}} and'
                    ' {"type": "text", "text": "..."}'
                )
        if message["role"] == "assistant" and not message_text(message):
            raise ValueError(f"{where}: has an empty answer; write one or remove the turn")
    if marks != len(images):
        raise ValueError(
            f"{where}: has {len(images)} images but {marks} {IMAGE_MARK} marks;"
            f" write one {IMAGE_MARK} in the text for each image"
        )


def check_conversation(conversation: Conversation) -> Conversation:
    """The conversation itself, if it can be trained on.

    Raises ValueError as `check_messages`, for a conversation without an answer and for an image that cannot
    be decoded (see `check_image`), FileNotFoundError for a missing image.
    """
    where = f"conversation {conversation.id!r}"
    check_messages(conversation.messages, conversation.images, where)
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise ValueError(f"{where}: has no assistant message, so nothing to learn from")
    for image in conversation.images:
        if not isinstance(image, Image.Image):
            try:
                check_image(image)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"{where}: {error}") from error
    return conversation


def check_conversations(
    conversations: Iterable[Conversation], *, max_bad_rate: float = 0.0, what: str = "conversations"
) -> list[Conversation]:
    """The conversations that `check_conversation` finds good; others are counted, reported and skipped.

    Raises as `keep_good` when more than `max_bad_rate` (0 to 1) of them are bad.
    """
    return keep_good(conversations, check_conversation, max_bad_rate=max_bad_rate, what=what)
