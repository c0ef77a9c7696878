"""Conversations for tests, and what is read from their encoding."""

import copy

from PIL import Image

from switchkd.data import Conversation


def talk(*turns, images=1, name="c", system=None):
    """A conversation of alternating user and assistant turns with `images` pictures before the first."""
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for i, text in enumerate(turns):
        content = [{"type": "text", "text": text}]
        if i == 0:
            content = [{"type": "image"}] * images + content
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return Conversation(name, messages, [Image.new("RGB", (40, 30), (i, 90, 200)) for i in range(images)])


def with_template(processor, template):
    changed = copy.copy(processor)
    changed.chat_template = template
    return changed


def runs(labels):
    """The ids of each unbroken run of labels, in order."""
    found, inside = [], False
    for label in labels.tolist():
        if label != -100:
            if not inside:
                found.append([])
            found[-1].append(label)
        inside = label != -100
    return found


TURNS = ("Is there any crazing?", "yes", "Café où? 裂纹 🙂", "là: 裂纹 🙂 [0, 12]", "Sure?", "no, none")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
