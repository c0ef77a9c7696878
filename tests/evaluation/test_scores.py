import json

import pytest

from switchkd.data.conversations.conversation import Conversation
from switchkd.evaluation import Answer, judged_rows, score_answers, score_detections


def located(*boxes) -> str:
    return json.dumps([{"label": label, "bbox": list(box)} for label, *box in boxes])


A = ("crack", 100, 100, 200, 200)
B = ("patch", 500, 500, 700, 700)
FAR = ("crack", 800, 800, 900, 900)


def ask(id_, kind, question, reference):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": reference}]},
    ]
    return Conversation(id_, messages, ["p.png"], kind)


CONVERSATIONS = [
    ask("0", "exists", "Any crack?", "yes"),
    ask("1", "locate", "Where?", located(A, B)),
    ask("2", "exists", "Any rust?", "no"),
    ask("3", "exists", "Any dent?", "no"),
    ask("4", "count", "How many?", "2"),
]


def spoken(text: str, probability: float) -> Answer:
    return Answer(text, ((0, len(text)),), (probability,))


def test_score_answers_by_kind():
    answers = [" Yes\n", located(A, FAR), "yes", "no", "3"]
    scores = score_answers(CONVERSATIONS, answers)
    assert scores["accuracy"] == pytest.approx({"count": 0.0, "exists": 2 / 3})
    assert scores["average"] == pytest.approx(1 / 3)
    assert scores["majority"] == pytest.approx({"count": 1.0, "exists": 2 / 3})
    assert scores["questions"] == {"count": 1, "exists": 3, "locate": 1}
    assert scores["locate"] == score_detections([located(A, FAR)], [located(A, B)])


def test_score_answers_ranks_boxes_by_the_probabilities_of_their_tokens():
    conversations = [ask("0", "locate", "Where?", located(A)), ask("1", "locate", "Where?", located(A))]
    right, wrong = located(A), located(FAR)
    sure = score_answers(conversations, [spoken(right, 0.9), spoken(wrong, 0.1)])
    unsure = score_answers(conversations, [spoken(right, 0.1), spoken(wrong, 0.9)])
    assert sure["locate"]["ap50"] == pytest.approx(51 / 101)
    assert unsure["locate"]["ap50"] == pytest.approx(51 / 101 / 2)
    assert (sure["average"], sure["accuracy"]) == (None, {})


def test_the_last_question_of_several_turns_is_judged():
    first, second = ask("0", "", "Any crack?", "yes"), ask("0", "", "Any rust?", "no")
    both = Conversation("0", first.messages + second.messages, ["p.png", "p.png"], "exists")
    assert score_answers([both], ["no"])["accuracy"] == {"exists": 1.0}
    (row,) = judged_rows([both], ["yes"])
    assert (row["question"], row["reference"], row["correct"]) == ("Any rust?", "no", False)


def test_judged_rows():
    rows = judged_rows(CONVERSATIONS[:2], ["YES ", spoken(located(B, A), 0.25)])
    assert rows[0] == {
        "id": "0",
        "kind": "exists",
        "question": "Any crack?",
        "reference": "yes",
        "answer": "YES ",
        "correct": True,
    }
    assert rows[1]["correct"] is True
    assert rows[1]["scores"] == pytest.approx([0.25, 0.25])
    json.dumps(rows)


def test_questions_without_a_reference_are_errors():
    open_question = Conversation("seven", CONVERSATIONS[0].messages[:1], ["p.png"], "exists")
    with pytest.raises(ValueError, match="conversation 'seven' ends in a question without a reference"):
        score_answers([open_question], ["yes"])
    with pytest.raises(ValueError, match="conversation 'eight' has no user message"):
        score_answers([Conversation("eight", [], [], "exists")], ["yes"])
    with pytest.raises(ValueError, match="reference of conversation 'nine' is not a list of boxes"):
        judged_rows([ask("nine", "locate", "Where?", "left")], ["[]"])
    with pytest.raises(ValueError, match="1 conversations but 0 answers"):
        score_answers(CONVERSATIONS[:1], [])
