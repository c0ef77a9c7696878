"""Pictures that a record has and its reader would not see: under other keys, behind other marks, as video or audio."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from switchkd.data.conversations.conversation import IMAGE_MARK, Conversation

logger = logging.getLogger(__name__)

# As other formats call them: images, image_path, imgUrl, video, audios, ...
FORMS = "(paths?|files?|file[_-]?names?|names?|urls?|uris?|ids?|data|bytes|base64|b64|list)"
PICTURE_KEY = re.compile(rf"(image|img|picture|photo|frame|pixel[_-]?value)s?([_-]?{FORMS})?", re.IGNORECASE)
OTHER_KEY = re.compile(r"(video|audio|sound)s?([_-]?(paths?|files?|urls?|data|bytes))?", re.IGNORECASE)
# Marks of other models, wherever they stand: <|image_pad|>, <|vision_start|>, <image_1>, <Image>, [IMG], <ImageHere>.
MARKS = re.compile(
    r"<\|\w*(?:image|img|vision|video|audio)\w*\|>"
    r"|<(?:image|img|picture|video|audio)[ _-]?\d+>"
    r"|< ?/?image ?/?>"
    r"|<(?:image|img|video|audio)[_-]?(?:placeholder|soft_token|token|pad|patch|here|start|end|context)>"
    r"|<(?:start|end)_of_(?:image|img|video|audio)>|<im_patch>|<fake_token_around_image>"
    r"|(?-i:\[(?:IMG|IMAGE|VIDEO|AUDIO)(?:_BREAK|_END|_PAD)?\])",
    re.IGNORECASE,
)
# Tags and words that texts about HTML hold as well: only where a turn begins or ends with one, as LLaVA's turns do.
TAG = r"(?:<(?:img|picture|video|audio)>|\[(?:image|img|picture|video|audio)\])"
TAGS = re.compile(rf"\A\s*({TAG})|({TAG})\s*\Z", re.IGNORECASE)
CLOSED = re.compile(r"</(?:picture|video|audio)>", re.IGNORECASE)  # HTML; Qwen-VL closes <img> alone


def refuse_lost_pictures(record: dict, own: str, messages: Sequence[dict], images: Sequence, where: str) -> None:
    """ValueError where a record has pictures beside the `images` that were read from its key `own`, "image" or
    "images": more of them under another key, of the record or of a turn, a mark of another model in a question, or
    video or audio. What these hold would be lost without a word, and the record be read as text alone.
    """
    turns = record.get("conversations") or record.get("messages")
    parts = [record, *turns, *(item for turn in turns for item in _items(turn))]
    for part in parts:
        for key in (key for key in part if part is not record or key != own):
            if PICTURE_KEY.fullmatch(str(key)) and (found := _held(part[key])) > len(images):
                raise ValueError(
                    f"{where}: its key {key!r} holds {found} pictures and {own!r}, which alone is read, {len(images)}:"
                    f" give them in {own!r}, with one {IMAGE_MARK} in the text for each"
                )
            if OTHER_KEY.fullmatch(str(key)) and _held(part[key]):
                raise ValueError(
                    f"{where}: its key {key!r} is not read, only pictures are: take out the record or the key"
                )
    for message in messages:
        texts = [item["text"] for item in message["content"] if item["type"] == "text"]
        for text in texts if message["role"] != "assistant" else ():
            if mark := _other_mark(text):
                raise ValueError(
                    f"{where}: its {message['role']} message holds {mark!r}, which no picture takes the place of: write"
                    f" {IMAGE_MARK} for each picture in {own!r}, or take the mark out"
                )


def warn_without_pictures(conversations: Sequence[Conversation], stage: str) -> None:
    """One warning where no conversation of a stage that distils has a picture: nothing visual is learnt from them."""
    if conversations and not any(each.images for each in conversations):
        logger.warning(
            "%s: none of its %s samples has a picture, so that the vision tower learns nothing and the visual switch "
            "has nothing to switch: check the keys and marks of the data",
            stage,
            f"{len(conversations):,}",
        )


def is_picture_key(key: str) -> bool:
    """Whether a key or column of this name would hold pictures, video or audio."""
    return bool(PICTURE_KEY.fullmatch(key) or OTHER_KEY.fullmatch(key))


def _items(turn: dict) -> list[dict]:
    content = turn.get("content")
    items = content if isinstance(content, list) else ()
    return [item for item in items if isinstance(item, dict) and item.get("type") == "text"]


def _held(value: Any) -> int:
    """How many pictures a value may hold; numbers up to 0, such as an id of -1, name none."""
    if isinstance(value, list | tuple):
        return sum(map(bool, map(_held, value)))
    if isinstance(value, int | float):
        return int(value > 0)
    return int(bool(value))


def _other_mark(text: str) -> str | None:
    if "<" not in text and "[" not in text:
        return None
    if mark := MARKS.search(text):
        return mark[0]
    tag = TAGS.search(text)
    return (tag[1] or tag[2]) if tag and not CLOSED.search(text) else None
