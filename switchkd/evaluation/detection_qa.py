"""Located answers: the boxes that a text holds, and what they are worth by `switchkd.evaluation.detection`."""

import json
import math
import numbers
from collections.abc import Sequence

from switchkd.evaluation.detection import matched, score_boxes
from switchkd.evaluation.generate import Answer

Box = tuple[str, list[float]]


def parse_boxes(text: str) -> list[Box] | None:
    """The (label, [x1, y1, x2, y2]) of a located answer, in its order; None where the answer is malformed.

    Well-formed is a JSON list, alone in the text, of objects with exactly the keys "label" (a text that is
    not blank) and "bbox" (four numbers from 0 to 1000, x1 < x2 and y1 < y2). `[]` is well-formed: none.
    """
    try:
        return _boxes(_JSON.decode(text))
    except (ValueError, RecursionError):
        return None


def box_scores(answer: Answer) -> list[float]:
    """A confidence for each box of a located answer; empty where the answer is malformed or has none.

    Ours: the geometric mean of the probabilities of the tokens that made the box's object, from "{" to "}";
    a token counts when it wrote at least one of those characters. The mean and not the product, so that a
    label of many tokens does not lower the rank of its box.
    """
    if not parse_boxes(answer.text):
        return []
    scores, end = [], 0
    while (start := answer.text.find("{", end)) >= 0:  # no brace stands between the objects
        end = _JSON.raw_decode(answer.text, start)[1]
        logs = [
            math.log(probability)
            for (first, last), probability in zip(answer.spans, answer.probabilities, strict=True)
            if first < end and last > start and first < last
        ]
        scores.append(math.exp(sum(logs) / len(logs)))
    return scores


def score_detections(
    predictions: Sequence[str | tuple[str, Sequence[float]]],
    references: Sequence[str | list[dict]],
    iou: float = 0.5,
) -> dict:
    """Scores located answers, one a picture, against their references.

    predictions: the answer text, or (text, a score for each of its boxes); a text alone scores 1.0 a box.
        Equal scores rank in the order of the pictures, so AP without scores depends on that order.
    references: the answer text, or a list of {"label", "bbox"}. Labels compare stripped, in lower case.
    iou: the least overlap at which a box counts as found, for f1, precision and recall.

    Returns what `score_boxes` does, its boxes in units of 0-1000, and
        malformed: share of the answers that are no list of boxes. They count as no boxes, so everything in
            their pictures is missed; scores that come with them are not looked at.

    Raises ValueError for lists of unequal length, a malformed reference, scores that are not one a box, or an
    iou outside 0..1; ModuleNotFoundError where pycocotools is missing.
    """
    wanted = [_reference_boxes(reference, f"reference {i}") for i, reference in enumerate(references)]
    claimed, malformed = [], 0
    for prediction in predictions:
        text, scores = (prediction, None) if isinstance(prediction, str) else prediction
        boxes = parse_boxes(text)
        malformed += boxes is None
        claimed.append(_arrays(boxes or [], [] if boxes is None else scores))
    scored = score_boxes(claimed, [_arrays(boxes) for boxes in wanted], iou)
    return scored | {"malformed": malformed / len(predictions) if predictions else 0.0}


def all_found(text: str, reference: str | list[dict], iou: float = 0.5) -> bool:
    """Whether a located answer is right as a whole: well-formed, its boxes and those of the reference pairing
    off with equal labels at that IoU, and none left over. Raises ValueError for a malformed reference.
    """
    boxes, wanted = parse_boxes(text), _reference_boxes(reference, "the reference")
    if boxes is None or len(boxes) != len(wanted):
        return False
    return matched([(_plain(label), box, 1.0) for label, box in boxes], wanted, iou) == len(wanted)


def _unique_keys(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return dict(pairs)


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _boxes(value) -> list[Box]:
    """A decoded list of objects as (label, box) pairs; ValueError that says what is wrong with it."""
    if not isinstance(value, list):
        raise ValueError("it is no list")
    boxes = []
    for item in value:
        if not isinstance(item, dict) or set(item) != {"label", "bbox"}:
            raise ValueError(f'{item!r} is no object with the keys "label" and "bbox" alone')
        label, box = item["label"], item["bbox"]
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"label {label!r} is no text")
        if not isinstance(box, list | tuple) or len(box) != 4:
            raise ValueError(f"bbox {box!r} is no list of four numbers")
        if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) and 0 <= v <= 1000 for v in box):
            raise ValueError(f"bbox {box!r} is not four numbers from 0 to 1000")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"bbox {box!r} is empty or inverted: x1 < x2 and y1 < y2 have to hold")
        boxes.append((label, [float(v) for v in box]))
    return boxes


def _reference_boxes(reference: str | list[dict], name: str) -> list[Box]:
    try:
        boxes = _boxes(_JSON.decode(reference) if isinstance(reference, str) else reference)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is not a list of boxes ({error}): {str(reference)[:200]!r}; it has to be JSON like"
            ' [{"label": "scratch", "bbox": [x1, y1, x2, y2]}] in units of 0-1000, or [] for none'
        ) from error
    return [(_plain(label), box) for label, box in boxes]


def _arrays(boxes: list[Box], scores: Sequence[float] | None = None) -> dict[str, list]:
    """Boxes as `score_boxes` takes them; 1.0 a box where there are no scores."""
    return {
        "boxes": [box for _, box in boxes],
        "labels": [_plain(label) for label, _ in boxes],
        "scores": [1.0] * len(boxes) if scores is None else scores,
    }


def _plain(label: str) -> str:
    return label.strip().lower()
