import json

import pytest
from PIL import Image

from switchkd.data import Conversation
from switchkd.evaluation import Answer
from switchkd.evaluation.drawing import ANSWER, REFERENCE, SIDE, draw_asked, draw_boxes, draw_located

# What the sheet's layout is: margins of 6, a line of 30 above the pictures and below each.
LEFT, TOP, ACROSS, DOWN = 6, 30, SIDE + 6, SIDE + 36


def located(*boxes):
    return json.dumps([{"label": "crack", "bbox": list(box)} for box in boxes])


def asked(kind="locate", size=(96, 96), reference=()):
    content = [{"type": "image"}, {"type": "text", "text": "Locate every defect."}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": located(*reference)}]}
    return Conversation("a", [{"role": "user", "content": content}, answer], [Image.new("RGB", size)], kind)


def answered(text):
    return Answer(text, (), ())


def cell(sheet, row=0, column=0, width=SIDE, height=SIDE):
    left, top = LEFT + column * ACROSS, TOP + row * DOWN
    return sheet.crop((left, top, left + width, top + height))


def pixels(picture, colour):
    return {(x, y) for x in range(picture.width) for y in range(picture.height) if picture.getpixel((x, y)) == colour}


def test_reference_and_answer_boxes_in_their_colours():
    question = asked(reference=[(250, 250, 750, 750)])
    answers = {"teacher": [answered(located((100, 500, 900, 1000)))], "student": [answered("[]")]}
    sheet = draw_located([question], answers)
    assert sheet.size == (LEFT + 2 * ACROSS, TOP + DOWN)
    student = cell(sheet, column=1)
    assert pixels(student, ANSWER) == set()
    found = pixels(student, REFERENCE)
    xs, ys = {x for x, _ in found}, {y for _, y in found}
    assert (min(xs), max(xs), min(ys), max(ys)) == (60, 180, 60, 180)  # a quarter of 240 pixels, three quarters
    assert {(60, y) for y in range(60, 181)} | {(x, 180) for x in range(60, 181)} <= found
    assert (120, 120) not in found
    teacher = cell(sheet)
    claimed = pixels(teacher, ANSWER)
    assert {(24, y) for y in range(120, 240)} | {(x, 239) for x in range(24, 217)} <= claimed
    assert pixels(teacher, REFERENCE) == found - claimed


def test_a_long_picture_keeps_its_shape():
    sheet = draw_located([asked(size=(40, 20), reference=[(0, 0, 500, 1000)])], {"m": [answered("[]")]})
    found = pixels(cell(sheet), REFERENCE)
    assert max(x for x, _ in found) == 120
    assert max(y for _, y in found) == 119
    assert cell(sheet).getpixel((200, 119)) == (0, 0, 0)
    assert cell(sheet).getpixel((200, 121)) == (255, 255, 255)


@pytest.mark.parametrize("text", ["no idea", '[{"label": "crack", "bbox": [1, 2', located((9, 9, 3, 3))])
def test_a_malformed_answer_is_written_across_its_picture(text):
    picture = cell(draw_located([asked()], {"m": [answered(text)]}))
    left, top, right, bottom = picture.getbbox()  # of what is not black
    assert left < 10
    assert 40 < right < 200
    assert 5 < top < bottom < 24
    red, green, blue = (top for _, top in picture.getextrema())
    assert (red > 200, blue < green < red) == (True, True)  # a shade of ANSWER: letters are smoothed
    assert cell(draw_located([asked()], {"m": [answered("[]")]})).getbbox() is None


def test_rows_are_spread_over_the_located_questions():
    # Question i has its box's left side at 10 * i; every second question is of another kind.
    questions = [asked("exists" if i % 2 else "locate", reference=[(10 * i, 0, 1000, 1000)]) for i in range(22)]
    sheet = draw_located(questions, {"m": [answered("[]")] * 22}, most=3)
    assert sheet.height == TOP + 3 * DOWN
    lefts = [min(x for x, _ in pixels(cell(sheet, row), REFERENCE)) for row in range(3)]
    assert lefts == [int(240 * 10 * i / 1000) for i in (0, 6, 14)]


def test_no_sheet_without_located_questions():
    assert draw_located([asked("exists")], {"m": [answered("yes")]}) is None


def test_a_name_and_a_question_that_are_too_long_end_before_the_sheet_does():
    question = asked()
    question.messages[0]["content"][1]["text"] = "Where? " * 100
    names = {"x" * 200: [answered("[]")], "y": [answered("[]")]}
    sheet = draw_located([question], names)
    assert sheet.size == (LEFT + 2 * ACROSS, TOP + DOWN)
    between = sheet.crop((LEFT + SIDE, 0, LEFT + ACROSS, TOP))  # the margin between the two names
    assert between.getextrema() == ((255, 255),) * 3
    below = sheet.crop((sheet.width - LEFT, TOP + SIDE, sheet.width, sheet.height))
    assert below.getextrema() == ((255, 255),) * 3


def test_an_asked_picture_has_a_panel_a_model_with_its_boxes():
    answers = [("teacher", answered(located((250, 500, 750, 1000)))), ("student", answered("crazing"))]
    sheet = draw_asked(Image.new("RGB", (96, 96)), answers)
    assert sheet.width == 2 * 480 + 3 * 6
    found = pixels(sheet, ANSWER)
    top = min(y for x, y in pixels(sheet.crop((0, 0, 7, sheet.height)), (0, 0, 0)) if x == 6)  # of the black picture
    corners = {(6 + 120, top + 240), (6 + 360, top + 240), (6 + 120, top + 479), (6 + 360, top + 479)}
    assert corners <= found
    assert max(x for x, _ in found) == 6 + 360
    assert (6 + 240, top + 360) not in found
    tag = {(x, y) for x, y in found if y < top + 240}
    assert min(x for x, _ in tag) == 6 + 120
    assert min(y for _, y in tag) > top + 200


@pytest.mark.parametrize("size", [(96, 40), (4000, 3), (3, 4000), (1, 1)])
def test_text_of_any_length_stays_in_its_panel(size):
    label = "a label that goes on and on " * 20
    boxes = [
        {"label": each, "bbox": box} for each, box in ((label, [0, 0, 1000, 1000]), ("裂\n纹", [999, 999, 1000, 1000]))
    ]
    texts = [json.dumps(boxes), "word " * 500, "W" * 3000, "", "a\n\n\nb\tc", "[]"]
    sheet = draw_asked(Image.new("RGB", size), [("path/" * 90, answered(text)) for text in texts])
    side = min(max(*size, 480), 1280)
    assert sheet.width == 6 + len(texts) * (side + 6)
    for column in range(len(texts) + 1):
        left = column * (side + 6)
        assert sheet.crop((left, 0, left + 6, sheet.height)).getextrema() == ((255, 255),) * 3


def test_a_label_s_tag_stays_on_the_picture():
    picture = Image.new("RGB", (200, 100))
    draw_boxes(picture, [("crack", [0, 0, 500, 500])], ANSWER)
    draw_boxes(picture, [("crack", [990, 500, 1000, 600])], REFERENCE)
    assert len([y for x, y in pixels(picture, ANSWER) if x == 1]) == 51  # inside its box: no room above
    tag = {(x, y) for x, y in pixels(picture, REFERENCE) if y < 50}
    assert max(x for x, _ in tag) == 199
    assert min(x for x, _ in tag) < 180
