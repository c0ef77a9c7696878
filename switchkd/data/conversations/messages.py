"""The reader of `messages` in JSON lines or parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchkd.data.bad_samples import keep_good
from switchkd.data.conversations.conversation import Conversation
from switchkd.data.conversations.parquet import parquet_rows
from switchkd.data.conversations.records import as_conversation, field, split_marks


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
        for message in field(record, "messages", where, '{"role": ..., "content": ...}'):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f'{where}: a message must be {{"role": ..., "content": ...}}, but is {message!r}')
            content = message["content"]
            if isinstance(content, str):
                content = split_marks(content)
            messages.append({"role": message["role"], "content": content})
        return as_conversation(record, path, number, messages, "images", image_root, where)

    rules = {"max_bad_rate": max_bad_rate, "what": str(path)}
    if parquet:
        return iter(keep_good(enumerate(parquet_rows(path)), read, **rules))
    with path.open("rb") as file:  # as bytes, so that a line that is not UTF-8 is one bad record
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        return iter(keep_good(lines, read, **rules))
