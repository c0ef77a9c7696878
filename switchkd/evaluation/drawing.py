"""Located answers drawn on their images, to be looked at."""

from __future__ import annotations

import textwrap
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from switchkd.data.conversations.conversation import Conversation
from switchkd.data.conversations.instruct import grid_to_box
from switchkd.data.images import load_image
from switchkd.evaluation.detection_qa import Box, parse_boxes
from switchkd.evaluation.generate import Answer

SIDE = 240  # pixels of a drawn image's longer side
REFERENCE, ANSWER = (60, 220, 120), (255, 170, 40)
MARGIN = 6

SMALLEST_PANEL, LARGEST_PANEL = 480, 1280  # longer side of an asked image's panel: its own between the two
CAPTION_LINES = 3


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
    caption, font = 30, ImageFont.load_default()
    width = len(answers) * (SIDE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, len(chosen) * (SIDE + caption + MARGIN) + caption), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(answers):
        pen.text((MARGIN + column * (SIDE + MARGIN), 8), _fitted(name, SIDE, font, keep="end"), fill="black")
    for row, index in enumerate(chosen):
        top = caption + row * (SIDE + caption + MARGIN)
        for column, name in enumerate(answers):
            left = MARGIN + column * (SIDE + MARGIN)
            drawn = _compared(conversations[index], answers[name][index])
            sheet.paste(drawn, (left, top))
        question = _fitted(conversations[index].question, width - 2 * MARGIN, font)
        pen.text((MARGIN, top + SIDE + 6), question, fill="black")
    return sheet


def draw_asked(image: Image.Image, answers: Sequence[tuple[str, Answer]]) -> Image.Image:
    """One panel a (model name, answer): the name, a copy of the image with the boxes of the answer, and under it how
    many they are, or the answer itself where it is no list of boxes; text that is too long ends in "...".
    """
    side = min(max(*image.size, SMALLEST_PANEL), LARGEST_PANEL)
    picture = _scaled(image, side)
    font = ImageFont.load_default(side // 32)
    line = sum(font.getmetrics()) + 3
    found = [parse_boxes(answer.text) for _, answer in answers]
    captions = [
        _wrapped(answer.text if boxes is None else f"{len(boxes)} box{'es' * (len(boxes) != 1)}", side, font)
        for boxes, (_, answer) in zip(found, answers, strict=True)
    ]
    below = MARGIN + line + picture.height + MARGIN
    height = below + max(map(len, captions)) * line + MARGIN
    sheet = Image.new("RGB", (len(answers) * (side + MARGIN) + MARGIN, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, ((name, _), boxes, caption) in enumerate(zip(answers, found, captions, strict=True)):
        left = MARGIN + column * (side + MARGIN)
        pen.text((left, MARGIN), _fitted(name, side, font, keep="end"), fill="black", font=font)
        panel = picture.copy()
        draw_boxes(panel, boxes or [], ANSWER, font=font)
        sheet.paste(panel, (left, MARGIN + line))
        for row, words in enumerate(caption):
            pen.text((left, below + row * line), words, fill="black", font=font)
    return sheet


def draw_boxes(
    picture: Image.Image, boxes: Sequence[Box], colour: tuple[int, int, int], *, font=None, labels: bool = True
) -> None:
    """Draws located boxes (label, [x1, y1, x2, y2] in 0-1000) on `picture`, each label on a tag at its box."""
    pen = ImageDraw.Draw(picture)
    font = font or ImageFont.load_default()
    placed = [(label, grid_to_box(box, *picture.size)) for label, box in boxes]
    for _, corners in placed:
        pen.rectangle(corners, outline=colour, width=2)
    for label, (x1, y1, _, _) in placed if labels else []:
        text = _fitted(label, picture.width - 4, font)
        width, height = font.getlength(text) + 4, sum(font.getmetrics())
        left = max(0, min(x1, picture.width - width))
        top = y1 - height if y1 >= height else y1  # above the box; inside it where there is no room above
        pen.rectangle((left, top, left + width, top + height), fill=colour)
        pen.text((left + 2, top), text, fill="black", font=font)


def _compared(conversation: Conversation, answer: Answer) -> Image.Image:
    picture = _scaled(load_image(conversation.images[-1]), SIDE)
    draw_boxes(picture, parse_boxes(conversation.answer) or [], REFERENCE, labels=False)
    found = parse_boxes(answer.text)
    if found is None:
        ImageDraw.Draw(picture).text((6, 6), "malformed answer", fill=ANSWER)
    draw_boxes(picture, found or [], ANSWER)
    return picture


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side has `side` pixels."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size])


def _wrapped(text: str, width: int, font) -> list[str]:
    """`text` on CAPTION_LINES lines of `width` pixels or fewer."""
    letters = int(width / font.getlength("e"))  # about a line's; what is wider all the same is cut
    lines = textwrap.wrap(text, letters, max_lines=CAPTION_LINES, placeholder=" ...")
    return [_fitted(line, width, font) for line in lines]


def _fitted(text: str, width: float, font, *, keep: str = "start") -> str:
    """`text` on one line, "..." for what does not fit into `width` pixels at its end (keep="end": at its start)."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text

    def cut(count: int) -> str:
        return f"{text[:count]}..." if keep == "start" else f"...{text[len(text) - count :]}"

    fitting = bisect_right(range(len(text)), width, key=lambda count: font.getlength(cut(count)))
    return cut(fitting - 1) if fitting else ""
