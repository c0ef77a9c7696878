"""The reader of LLaVA JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchkd.data.bad_samples import keep_good
from switchkd.data.conversations.conversation import Conversation
from switchkd.data.conversations.records import as_conversation, field, split_marks

LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def read_llava(path: str | Path, image_root: str | Path, *, max_bad_rate: float = 0.0) -> Iterator[Conversation]:
    """The conversations of a LLaVA JSON file: a list of {"id", "image": path, list of paths or absent,
    "conversations": [{"from": "human" or "gpt", "value": "<image>\\n..."}, ...]}.

    As LLaVA and TinyLLaVA do, a turn with one mark shows its image first, wherever the mark stands, and answers
    before the first question are left out (ShareGPT's conversations in `llava_v1_5_mix665k.json`). Several marks of
    one turn keep their places, which is ours. Other keys are ignored, but for those of pictures
    (`refuse_lost_pictures`), and an id may come twice.

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
        for turn in field(record, "conversations", where, '{"from": ..., "value": ...}'):
            parts = [turn.get("from"), turn.get("value")] if isinstance(turn, dict) else []
            if not parts or not all(isinstance(part, str) for part in parts):
                raise ValueError(f'{where}: a turn must be {{"from": ..., "value": "..."}}, but is {turn!r}')
            role = LLAVA_ROLES.get(turn["from"])
            if role is None:
                known = ", ".join(LLAVA_ROLES)
                raise ValueError(f'{where}: unknown role {turn["from"]!r} in "from"; known roles are {known}')
            if messages or role != "assistant":
                messages.append({"role": role, "content": split_marks(turn["value"], one_first=True)})
        return as_conversation(record, path, number, messages, "image", image_root, where)

    return iter(keep_good(enumerate(records), read, max_bad_rate=max_bad_rate, what=str(path)))
