"""Answers of a model, judged by kind of question: located ones by their boxes, all others by exact match."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from switchkd.data.conversations.conversation import Conversation, message_text
from switchkd.evaluation.detection_qa import all_found, box_scores, parse_boxes, score_detections
from switchkd.evaluation.generate import Answer, last_question

LOCATE = "locate"  # the kind of question that is answered in boxes


def score_answers(conversations: Sequence[Conversation], answers: Sequence[Answer | str]) -> dict:
    """Scores the answers to the last questions of `conversations`, by kind of question.

    Returns
        accuracy: {kind: share of the answers equal to the reference, both stripped and in lower case}, for
            every kind but "locate".
        average: the mean of those accuracies, every kind counting the same; None where there are none.
        majority: {kind: share of the questions whose reference is the kind's most frequent one}: the accuracy
            of one fixed answer, and so the chance level to hold against a blind control.
        questions: {kind: number of questions}.
        locate: `score_detections` of the "locate" questions, only where there are any. The boxes of an
            Answer score by `box_scores`, those of a plain text 1.0.

    Raises ValueError where a conversation has no reference answer, a located reference is malformed, or there
    are not as many answers as conversations.
    """
    by_kind = defaultdict(list)
    for kind, _, reference, answer in _judged(conversations, answers):
        by_kind[kind].append((reference, answer))
    questions = {kind: len(pairs) for kind, pairs in sorted(by_kind.items())}
    located = by_kind.pop(LOCATE, [])
    accuracy, majority = {}, {}
    for kind, pairs in sorted(by_kind.items()):
        references = Counter(_plain(reference) for reference, _ in pairs)
        majority[kind] = references.most_common(1)[0][1] / len(pairs)
        accuracy[kind] = sum(_equal(answer, reference) for reference, answer in pairs) / len(pairs)
    scores = {
        "accuracy": accuracy,
        "average": sum(accuracy.values()) / len(accuracy) if accuracy else None,
        "majority": majority,
        "questions": questions,
    }
    if located:
        predictions = [(_text(answer), _scores(answer)) for _, answer in located]
        scores[LOCATE] = score_detections(predictions, [reference for reference, _ in located])
    return scores


def judged_rows(conversations: Sequence[Conversation], answers: Sequence[Answer | str]) -> list[dict]:
    """A row for each question, as answers.jsonl keeps them: id, kind, question, reference, answer, correct.

    A located answer is correct where all its boxes, and all of the reference's, are found (`all_found`); its
    row also has `scores`, one a box, so that the file is enough to compute its AP again. Any other answer is
    correct where it equals the reference, both stripped and in lower case. Raises as `score_answers`.
    """
    rows = []
    judged = _judged(conversations, answers)
    for conversation, (kind, question, reference, answer) in zip(conversations, judged, strict=True):
        row = {
            "id": conversation.id,
            "kind": kind,
            "question": question,
            "reference": reference,
            "answer": _text(answer),
            "correct": _equal(answer, reference),
        }
        if kind == LOCATE:
            row |= {"correct": all_found(_text(answer), reference), "scores": _scores(answer)}
        rows.append(row)
    return rows


def _judged(conversations, answers) -> list[tuple[str, str, str, Answer | str]]:
    """(kind, question, reference, answer) of each last question."""
    if len(conversations) != len(answers):
        raise ValueError(
            f"{len(conversations)} conversations but {len(answers)} answers: give one answer a conversation"
        )
    judged = []
    for conversation, answer in zip(conversations, answers, strict=True):
        following = conversation.messages[last_question(conversation) + 1 :]
        if not following or following[0]["role"] != "assistant":
            raise ValueError(
                f"conversation {conversation.id!r} ends in a question without a reference answer: add the"
                " assistant message that its answer is to be held against"
            )
        reference = message_text(following[0])
        if conversation.kind == LOCATE and parse_boxes(reference) is None:
            raise ValueError(
                f"the reference of conversation {conversation.id!r} is not a list of boxes:"
                f" {reference[:200]!r}; it has to be a JSON list of objects of a label and a bbox"
                " [x1, y1, x2, y2] in units of 0-1000, or [] for none"
            )
        judged.append((conversation.kind, conversation.question, reference, answer))
    return judged


def _text(answer: Answer | str) -> str:
    return answer if isinstance(answer, str) else answer.text


def _scores(answer: Answer | str) -> list[float]:
    if isinstance(answer, str):
        return [1.0] * len(parse_boxes(answer) or [])
    return box_scores(answer)


def _equal(answer: Answer | str, reference: str) -> bool:
    return _plain(_text(answer)) == _plain(reference)


def _plain(text: str) -> str:
    return text.strip().lower()
