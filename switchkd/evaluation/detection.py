"""Boxes, in any unit, against reference boxes: average precision and F1, of a detector and of a VLM alike."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COCO_IOUS = np.linspace(0.5, 0.95, 10)

Label = str | int
Labelled = tuple[Label, list[float]]  # a label and its box
Scored = tuple[Label, list[float], float]


def score_boxes(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], iou: float = 0.5
) -> dict:
    """Scores the boxes found on each picture against those that are there.

    predictions: for each picture {"boxes": [n, 4], "labels": [n], "scores": [n]}, as transformers'
        `post_process_object_detection` gives them: lists, arrays or tensors on the CPU. A box is (x1, y1, x2, y2) in
        one unit for all, pixels or shares of the picture alike; labels are texts or numbers, equal where they are the
        same. Equal scores rank in the order of the pictures.
    references: the same without scores.
    iou: the least overlap at which a box counts as found, for f1, precision and recall.

    Returns
        ap50, ap: COCO's average precision at IoU 0.50 and over 0.50:0.95 (pycocotools; no limit on boxes a picture or
            on their size), the mean over the references' labels; None without any reference.
        f1, precision, recall: over all boxes, whatever their scores; f1 = 2 TP / (2 TP + FP + FN). All three
            are 1.0 where there is nothing to find and nothing was claimed; otherwise precision without a
            claim, and recall without anything to find, are 0.0.
        ap50_by_label: {label: ap50}, for the labels of the references.
        counts: pictures, references, predictions (boxes), true_positives, false_positives, false_negatives,
            and unknown_labels: predicted boxes of a label that no reference has. These are among the
            false positives; an average precision, a mean over the references' labels, does not see them.
        iou: as given.

    Raises ValueError for lists of unequal length, boxes that are not four finite numbers each with x1 < x2 and
    y1 < y2, labels or scores that are not one a box, a score that is no finite number, or an iou outside 0..1;
    ModuleNotFoundError where pycocotools is missing.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: each needs the other")
    if not 0 < iou <= 1:
        raise ValueError(f"iou is {iou}: give a share of overlap above 0 and up to 1, such as 0.5")
    wanted = [_boxes(reference, f"reference {index}") for index, reference in enumerate(references)]
    claimed = [_scored(prediction, f"prediction {index}") for index, prediction in enumerate(predictions)]
    found = sum(matched(boxes, reference, iou) for boxes, reference in zip(claimed, wanted, strict=True))
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


def matched(claimed: Sequence[Scored], wanted: Sequence[Labelled], iou: float) -> int:
    """True positives of one picture, matched as COCO does: by falling score, each takes the free box of its label that
    it overlaps most, at `iou` or more."""
    free, found = list(wanted), 0
    for label, box, _ in sorted(claimed, key=lambda item: -item[2]):
        overlaps = [overlap(box, other) if label == name else 0.0 for name, other in free]
        if overlaps and max(overlaps) >= min(iou, 1 - 1e-10):
            del free[overlaps.index(max(overlaps))]
            found += 1
    return found


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _boxes(picture: Mapping[str, Any], name: str) -> list[Labelled]:
    boxes = np.asarray(picture["boxes"], np.float64)
    labels = picture["labels"]
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} has boxes of shape {list(boxes.shape)}: give [n, 4], a row (x1, y1, x2, y2) a box")
    if len(labels) != len(boxes):
        raise ValueError(f"{name} has {len(boxes)} boxes but {len(labels)} labels: give one label a box")
    good = np.isfinite(boxes).all(1) & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    if not good.all():
        first = int((~good).argmax())
        raise ValueError(
            f"{name}: box {boxes[first].tolist()} of {labels[first]!r} is empty, inverted or not finite:"
            " it must have x1 < x2 and y1 < y2"
        )
    return list(zip(labels, boxes.tolist(), strict=True))


def _scored(picture: Mapping[str, Any], name: str) -> list[Scored]:
    boxes = _boxes(picture, name)
    scores = np.asarray(picture["scores"], np.float64).tolist()
    if len(scores) != len(boxes):
        raise ValueError(f"{name} has {len(boxes)} boxes but {len(scores)} scores: give one score a box")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} has a score that is no finite number: {scores}")
    return [(label, box, score) for (label, box), score in zip(boxes, scores, strict=True)]


def _average_precisions(claimed: list[list[Scored]], wanted: list[list[Labelled]], labels: list[Label]) -> np.ndarray:
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
        evaluation.params.areaRng = [[0, float("inf")]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"].mean(axis=1)[:, :, 0, 0]  # [IoU, recalls, labels, areas, maxDets]


def _coco(pictures: list[list[Scored]], labels: list[Label]):
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
