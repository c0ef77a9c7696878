"""Conversations about images, and the readers of LLaVA JSON and of `messages` in JSON lines or parquet."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from switchkd.data.bad_samples import keep_good
from switchkd.data.images import StoredImage, check_image, inside
from switchkd.data.parquet import ParquetImage, parquet_rows

IMAGE_MARK = "<image>"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant")
LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


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


def read_llava(path: str | Path, image_root: str | Path, *, max_bad_rate: float = 0.0) -> Iterator[Conversation]:
    """The conversations of a LLaVA JSON file: a list of {"id", "image": path, list of paths or absent,
    "conversations": [{"from": "human" or "gpt", "value": "<image>\\n..."}, ...]}.

    As LLaVA and TinyLLaVA do, a turn with one mark shows its image first, wherever the mark stands, and answers
    before the first question are left out (ShareGPT's conversations in `llava_v1_5_mix665k.json`). Several marks of
    one turn keep their places, which is ours. Other keys are ignored, and an id may come twice.

    The whole file is read and its structure checked (`check_messages`) before the first conversation is
    returned; image files are not opened. Image paths are relative to `image_root` and must stay inside it.
    Raises ValueError naming file and record, past `max_bad_rate` (0 to 1) bad records.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); JSON lines are read by read_messages") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: LLaVA JSON is a list of records, but this file holds a {type(records).__name__}")

    def read(numbered: tuple[int, Any]) -> Conversation:
        number, record = numbered
        where = f"{path}, record {number}"
        messages: list[dict] = []
        for turn in _field(record, "conversations", where, '{"from": ..., "value": ...}'):
            parts = [turn.get("from"), turn.get("value")] if isinstance(turn, dict) else []
            if not parts or not all(isinstance(part, str) for part in parts):
                raise ValueError(f'{where}: a turn must be {{"from": ..., "value": "..."}}, but is {turn!r}')
            role = LLAVA_ROLES.get(turn["from"])
            if role is None:
                known = ", ".join(LLAVA_ROLES)
                raise ValueError(f'{where}: unknown role {turn["from"]!r} in "from"; known roles are {known}')
            if messages or role != "assistant":
                messages.append({"role": role, "content": split_marks(turn["value"], one_first=True)})
        names = record.get("image") or []
        return _conversation(
            record, path, number, messages, [names] if isinstance(names, str) else names, image_root, where
        )

    return iter(keep_good(enumerate(records), read, max_bad_rate=max_bad_rate, what=str(path)))


def read_messages(path: str | Path, image_root: str | Path, *, max_bad_rate: float = 0.0) -> Iterator[Conversation]:
    """The conversations of JSON lines {"id"?, "messages": [{"role", "content"}], "images": [path, ...]}, or of
    parquet with these columns (a `.parquet` file, or a folder of them; see `parquet_rows`).

    The content is text with an <image> mark for each image, or a list of {"type": "image"} and
    {"type": "text", "text": ...}. Parquet may hold pictures themselves: structs of bytes and path, as Hugging Face
    stores them. Reads and checks as `read_llava`; raises ValueError naming file and line or row.
    """
    path = Path(path)
    parquet = path.suffix == ".parquet" or path.is_dir()

    def read(numbered: tuple[int, Any]) -> Conversation:
        number, record = numbered
        where = f"{path}, {'row' if parquet else 'line'} {number}"
        if not parquet:
            try:
                record = json.loads(record)
            except ValueError as error:
                raise ValueError(f"{where}: is not JSON ({error}); one record a line is expected") from error
        messages = []
        for message in _field(record, "messages", where, '{"role": ..., "content": ...}'):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f'{where}: a message must be {{"role": ..., "content": ...}}, but is {message!r}')
            content = message["content"]
            if isinstance(content, str):
                content = split_marks(content)
            messages.append({"role": message["role"], "content": content})
        return _conversation(record, path, number, messages, record.get("images") or [], image_root, where)

    rules = {"max_bad_rate": max_bad_rate, "what": str(path)}
    if parquet:
        return iter(keep_good(enumerate(parquet_rows(path)), read, **rules))
    with path.open("rb") as file:  # as bytes, so that a line that is not UTF-8 is one bad record
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        return iter(keep_good(lines, read, **rules))


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


def join_turns(conversations: Iterable[Conversation], *, shuffle_seed: int | None = None) -> list[Conversation]:
    """Consecutive conversations of one question each about the same images, joined to one of several turns.

    The images stay in the first turn only. The joined one is called after its first and the number of turns
    that follow ("a/exists+3") and has no kind. Conversations without images or with several questions stay.
    shuffle_seed: shuffle the turns of each, so that no kind of question is always asked after another whose
    answer gives its own away; None keeps their order.
    """
    joined = []
    for key, group in groupby(conversations, key=_joinable):
        turns = list(group)
        if key is None or len(turns) == 1:
            joined.extend(turns)
            continue
        if shuffle_seed is not None:
            random.Random(f"{shuffle_seed}/{turns[0].id}").shuffle(turns)
        messages = list(turns[0].messages)
        for turn in turns[1:]:
            for message in turn.messages:
                content = [item for item in message["content"] if item["type"] != "image"]
                messages.append({"role": message["role"], "content": content})
        joined.append(Conversation(f"{turns[0].id}+{len(turns) - 1}", messages, turns[0].images))
    return joined


def _joinable(conversation: Conversation) -> tuple | None:
    """What two conversations must share to be joined; None: never joined."""
    roles = [message["role"] for message in conversation.messages]
    if not conversation.images or roles != ["user", "assistant"]:
        return None
    return tuple(id(each) if isinstance(each, Image.Image) else str(each) for each in conversation.images)


def _field(record: Any, name: str, where: str, items: str) -> list:
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


def _conversation(
    record: dict, path: Path, number: int, messages: list[dict], names: Any, image_root: str | Path, where: str
) -> Conversation:
    if not isinstance(names, list) or not all(isinstance(name, str | ParquetImage) for name in names):
        raise ValueError(f"{where}: image paths must be text or a list of texts, but are {_kinds(names)}")
    try:
        images = [inside(image_root, name) if isinstance(name, str) else name for name in names]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_messages(messages, images, where)
    name = record.get("id")
    return Conversation(f"{path.stem}-{number}" if name is None else str(name), messages, images, source=str(path))
