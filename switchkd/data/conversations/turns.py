"""Questions about the same images, joined to conversations of several turns."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import groupby

from PIL import Image

from switchkd.data.conversations.conversation import Conversation


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
