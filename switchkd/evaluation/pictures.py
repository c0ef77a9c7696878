"""Located answers drawn on their images, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from switchkd.data.conversations import Conversation
from switchkd.data.images import load_image
from switchkd.data.instruct import grid_to_box
from switchkd.evaluation.detection_qa import parse_boxes
from switchkd.evaluation.generate import Answer

SIDE = 240  # pixels of a drawn image's longer side
REFERENCE, ANSWER = (60, 220, 120), (255, 170, 40)


def draw_located(
    conversations: Sequence[Conversation], answers: Mapping[str, Sequence[Answer]], *, most: int = 6
) -> Image.Image | None:
    """One sheet: a row an image, a column a model; reference boxes green, answered boxes orange with their label.

    conversations: the judged ones; only those of kind "locate" are drawn, `most` of them, evenly spread. answers: by
    model name, one an entry of `conversations`. A malformed answer is written across its picture. None where no
    question is of that kind.
    """
    located = [index for index, conversation in enumerate(conversations) if conversation.kind == "locate"]
    if not located:
        return None
    rows = min(most, len(located))
    chosen = [located[row * len(located) // rows] for row in range(rows)]
    margin, caption = 6, 30
    sheet = Image.new(
        "RGB",
        (len(answers) * (SIDE + margin) + margin, len(chosen) * (SIDE + caption + margin) + caption),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(answers):
        pen.text((margin + column * (SIDE + margin), 8), name, fill="black")
    for row, index in enumerate(chosen):
        top = caption + row * (SIDE + caption + margin)
        for column, name in enumerate(answers):
            left = margin + column * (SIDE + margin)
            drawn = _drawn(conversations[index], answers[name][index])
            sheet.paste(drawn, (left, top))
        pen.text((margin, top + SIDE + 6), conversations[index].question, fill="black")
    return sheet


def _drawn(conversation: Conversation, answer: Answer) -> Image.Image:
    picture = load_image(conversation.images[-1])
    scale = SIDE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    pen = ImageDraw.Draw(picture)
    for _, box in parse_boxes(conversation.answer) or []:
        pen.rectangle(grid_to_box(box, *picture.size), outline=REFERENCE, width=2)
    found = parse_boxes(answer.text)
    if found is None:
        pen.text((6, 6), "malformed answer", fill=ANSWER)
    for label, box in found or []:
        corners = grid_to_box(box, *picture.size)
        pen.rectangle(corners, outline=ANSWER, width=2)
        pen.text((corners[0] + 3, corners[1] + 2), label, fill=ANSWER)
    return picture
