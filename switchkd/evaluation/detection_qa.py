"""Located answers: JSON boxes in, AP50, F1 and the share of malformed answers out."""

import contextlib
import io
import json
import math
import numbers
from collections.abc import Sequence

import numpy as np

from switchkd.evaluation.generate import Answer

COCO_IOUS = np.linspace(0.5, 0.95, 10)

Box = tuple[str, list[float]]
ScoredBox = tuple[str, list[float], float]


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

    Returns
        ap50, ap: COCO's average precision at IoU 0.50 and over 0.50:0.95 (pycocotools; units of 0-1000, no
            limit on boxes a picture), the mean over the references' labels; None without any reference.
        f1, precision, recall: over all boxes, whatever their scores; f1 = 2 TP / (2 TP + FP + FN). All three
            are 1.0 where there is nothing to find and nothing was claimed; otherwise precision without a
            claim, and recall without anything to find, are 0.0.
        malformed: share of the answers that are no list of boxes. They count as no boxes, so everything in
            their pictures is missed; scores that come with them are not looked at.
        ap50_by_label: {label: ap50}, for the labels of the references.
        counts: pictures, references, predictions (boxes), true_positives, false_positives, false_negatives,
            and unknown_labels: predicted boxes of a label that no reference has. These are among the
            false positives; an average precision, a mean over the references' labels, does not see them.
        iou: as given.

    Raises ValueError for lists of unequal length, a malformed reference, scores that are not one a box, or an
    iou outside 0..1; ModuleNotFoundError where pycocotools is missing.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: each needs the other")
    if not 0 < iou <= 1:
        raise ValueError(f"iou is {iou}: give a share of overlap above 0 and up to 1, such as 0.5")
    wanted = [_reference_boxes(reference, f"reference {i}") for i, reference in enumerate(references)]
    claimed, malformed = [], 0
    for index, prediction in enumerate(predictions):
        text, scores = (prediction, None) if isinstance(prediction, str) else prediction
        boxes = parse_boxes(text)
        malformed += boxes is None
        claimed.append([] if boxes is None else _scored_boxes(boxes, scores, index))

    found = sum(_found(boxes, reference, iou) for boxes, reference in zip(claimed, wanted, strict=True))
    labels = sorted({label for boxes in wanted for label, _ in boxes})
    n_claimed, n_wanted = sum(map(len, claimed)), sum(map(len, wanted))
    both = n_claimed + n_wanted
    precisions = _average_precisions(claimed, wanted, labels)  # [10 IoU, labels]
    return {
        "ap50": float(precisions[0].mean()) if labels else None,
        "ap": float(precisions.mean()) if labels else None,
        "f1": 2 * found / both if both else 1.0,
        "precision": found / n_claimed if n_claimed else float(not both),
        "recall": found / n_wanted if n_wanted else float(not both),
        "malformed": malformed / len(predictions) if predictions else 0.0,
        "ap50_by_label": {label: float(value) for label, value in zip(labels, precisions[0], strict=True)},
        "counts": {
            "pictures": len(references),
            "references": n_wanted,
            "predictions": n_claimed,
            "true_positives": found,
            "false_positives": n_claimed - found,
            "false_negatives": n_wanted - found,
            "unknown_labels": sum(label not in labels for boxes in claimed for label, _, _ in boxes),
        },
        "iou": iou,
    }


def all_found(text: str, reference: str | list[dict], iou: float = 0.5) -> bool:
    """Whether a located answer is right as a whole: well-formed, its boxes and those of the reference pairing
    off with equal labels at that IoU, and none left over. Raises ValueError for a malformed reference.
    """
    boxes, wanted = parse_boxes(text), _reference_boxes(reference, "the reference")
    if boxes is None or len(boxes) != len(wanted):
        return False
    return _found(_scored_boxes(boxes, None, 0), wanted, iou) == len(wanted)


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


def _scored_boxes(boxes: list[Box], scores: Sequence[float] | None, index: int) -> list[ScoredBox]:
    scores = [1.0] * len(boxes) if scores is None else list(scores)
    if len(scores) != len(boxes):
        raise ValueError(f"prediction {index} has {len(boxes)} boxes but {len(scores)} scores: give one score a box")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"prediction {index} has a score that is no finite number: {scores}")
    return [(_plain(label), box, float(score)) for (label, box), score in zip(boxes, scores, strict=True)]


def _plain(label: str) -> str:
    return label.strip().lower()


def _overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _found(claimed: list[ScoredBox], wanted: list[Box], iou: float) -> int:
    """True positives of one picture, matched as COCO does: by falling score, each takes the free box that it
    overlaps most."""
    free, found = list(wanted), 0
    for label, box, _ in sorted(claimed, key=lambda item: -item[2]):
        overlaps = [_overlap(box, other) if label == name else 0.0 for name, other in free]
        if overlaps and max(overlaps) >= min(iou, 1 - 1e-10):
            del free[overlaps.index(max(overlaps))]
            found += 1
    return found


def _average_precisions(claimed: list[list[ScoredBox]], wanted: list[list[Box]], labels: list[str]) -> np.ndarray:
    """COCO's average precision, interpolated at 101 recalls: [10 IoU, labels]."""
    try:
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("average precision needs pycocotools: pip install pycocotools") from error
    if not labels:
        return np.zeros((len(COCO_IOUS), 0))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco([[(*box, 0.0) for box in boxes] for boxes in wanted], labels),
            _coco(claimed, labels),
            "bbox",
        )
        evaluation.params.iouThrs = COCO_IOUS
        evaluation.params.maxDets = [max(1, *map(len, claimed))]
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"].mean(axis=1)[:, :, 0, 0]  # [IoU, recalls, labels, areas, maxDets]


def _coco(pictures: list[list[ScoredBox]], labels: list[str]):
    """The boxes of `labels` as a pycocotools COCO; the others belong to no average precision."""
    from pycocotools.coco import COCO

    boxes = [(i, *box) for i, picture in enumerate(pictures) for box in picture if box[0] in labels]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(pictures))],
        "categories": [{"id": i, "name": label} for i, label in enumerate(labels)],
        "annotations": [
            {
                "id": number,
                "image_id": picture,
                "category_id": labels.index(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": score,
            }
            # from 1: COCOeval takes the id 0 for "not matched"
            for number, (picture, label, (x1, y1, x2, y2), score) in enumerate(boxes, start=1)
        ],
    }
    coco.createIndex()
    return coco
