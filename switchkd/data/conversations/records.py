"""One record of a file -> a conversation: what the readers of LLaVA JSON and of messages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchkd.data.conversations.conversation import IMAGE_MARK, Conversation, check_messages
from switchkd.data.conversations.lost_pictures import refuse_lost_pictures
from switchkd.data.conversations.parquet import ParquetImage
from switchkd.data.images import inside


def split_marks(text: str, *, one_first: bool = False) -> list[dict]:
    """Text with <image> marks as content items; line breaks beside a mark go, the template sets its own.

    one_first: the image of a text with a single mark comes before the text, wherever the mark stands.
    """
    parts = text.strip().split(IMAGE_MARK)
    if one_first and len(parts) == 2:
        parts = ["", "".join(parts).strip()]
    items: list[dict] = []
    for index, part in enumerate(parts):
        if index:
            items.append({"type": "image"})
        part = part.strip("\n") if len(parts) > 1 else part
        if part:
            items.append({"type": "text", "text": part})
    return items


def field(record: Any, name: str, where: str, items: str) -> list:
    """The list that a record must have under `name`."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, list) or not value:
        found = f"keys {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f'{where}: unknown layout: a record needs "{name}", a list of {items}, but has {found}.'
            ' LLaVA JSON ("conversations") is read by read_llava, JSON lines with "messages" by read_messages'
        )
    return value


def _kinds(names: Any) -> str:
    kinds = {type(each).__name__ for each in names} if isinstance(names, list) else {type(names).__name__}
    return ", ".join(sorted(kinds))


def as_conversation(
    record: dict, path: Path, number: int, messages: list[dict], own: str, image_root: str | Path, where: str
) -> Conversation:
    """The conversation of a record whose pictures stand under its key `own`, its structure checked."""
    names = record.get(own) or []
    names = [names] if own == "image" and isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str | ParquetImage) for name in names):
        raise ValueError(f"{where}: image paths must be text or a list of texts, but are {_kinds(names)}")
    try:
        images = [inside(image_root, name) if isinstance(name, str) else name for name in names]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_messages(messages, images, where)
    refuse_lost_pictures(record, own, messages, images, where)
    name = record.get("id")
    return Conversation(f"{path.stem}-{number}" if name is None else str(name), messages, images, source=str(path))
