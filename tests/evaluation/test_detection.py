"""Boxes of a detector, as arrays: the same figures as the same boxes in a VLM's answers, in any unit."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from switchkd.evaluation import score_boxes, score_detections


def pictures(seed, count=60):
    """References and predictions of `count` pictures, as (label, box in 0-1000, score)."""
    draw = random.Random(seed)

    def box():
        x, y = draw.randrange(700), draw.randrange(700)
        return [x, y, x + draw.randrange(20, 300), y + draw.randrange(20, 300)]

    wanted = [[(draw.choice("abc"), box()) for _ in range(draw.randrange(4))] for _ in range(count)]
    claimed = []
    for boxes in wanted:
        near = [(label, [min(max(side + draw.randrange(-15, 16), 0), 1000) for side in at]) for label, at in boxes]
        claimed.append([(*each, draw.random()) for each in [*near, ("z", box()), (draw.choice("abc"), box())]])
    return wanted, claimed


def arrays(pictures, as_array=np.asarray, scale=1.0):
    made = []
    for boxes in pictures:
        columns = list(zip(*boxes, strict=True)) or [(), (), ()]
        made.append({"boxes": as_array([[side * scale for side in box] for box in columns[1]])})
        made[-1]["labels"] = as_array(["abcz".index(label) for label in columns[0]])
        if len(columns) == 3:
            made[-1]["scores"] = as_array(columns[2])
    return made


def test_a_detector_and_a_vlm_of_the_same_boxes_score_the_same():
    wanted, claimed = pictures(0)
    said = [json.dumps([{"label": label, "bbox": box} for label, box, *_ in boxes]) for boxes in claimed]
    there = [[{"label": label, "bbox": box} for label, box in boxes] for boxes in wanted]
    text = score_detections([(each, [b[2] for b in boxes]) for each, boxes in zip(said, claimed, strict=True)], there)
    found = score_boxes(arrays(claimed), arrays(wanted))
    by_number = {"abc".index(label): value for label, value in text.pop("ap50_by_label").items()}
    assert text.pop("malformed") == 0
    assert found.pop("ap50_by_label") == by_number
    assert found == text
    assert 0.2 < found["ap"] < found["ap50"] < 1
    assert found["counts"]["unknown_labels"] == 60


@pytest.mark.parametrize("scale", [1 / 1024, 64, 2.0**20])
def test_the_unit_does_not_matter(scale):
    wanted, claimed = pictures(1)
    assert score_boxes(arrays(claimed, scale=scale), arrays(wanted, scale=scale)) == score_boxes(
        arrays(claimed), arrays(wanted)
    )


def test_tensors_arrays_and_lists_are_read_alike():
    wanted, claimed = pictures(2, count=5)
    expected = score_boxes(arrays(claimed, list), arrays(wanted, list))
    assert score_boxes(arrays(claimed, torch.tensor), arrays(wanted, torch.tensor))["f1"] == expected["f1"]
    assert score_boxes(arrays(claimed), arrays(wanted)) == expected


def test_nothing_there_and_nothing_found():
    empty = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    assert score_boxes([], [])["f1"] == 1
    assert score_boxes([empty], [empty])["ap"] is None
    assert score_boxes([empty], [{"boxes": [[0, 0, 1, 1]], "labels": ["a"]}])["ap50"] == 0


GOOD = {"boxes": [[0, 0, 2, 2]], "labels": ["a"], "scores": [0.5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, 2]]}, r"prediction 0 has boxes of shape \[1, 3\]: give \[n, 4\]"),
        ({"boxes": [0, 0, 2, 2]}, r"prediction 0 has boxes of shape \[4\]"),
        ({"boxes": [[2, 0, 2, 2]]}, r"prediction 0: box \[2\.0, 0\.0, 2\.0, 2\.0\] of 'a' is empty"),
        ({"boxes": [[0, 0, float("nan"), 2]]}, r"prediction 0: box .*not finite"),
        ({"boxes": [[0, 0, float("inf"), 2]]}, r"prediction 0: box .*not finite"),
        ({"labels": ["a", "b"]}, "prediction 0 has 1 boxes but 2 labels"),
        ({"scores": []}, "prediction 0 has 1 boxes but 0 scores: give one score a box"),
        ({"scores": [float("nan")]}, "prediction 0 has a score that is no finite number"),
    ],
)
def test_boxes_that_cannot_be_scored(changes, message):
    with pytest.raises(ValueError, match=message):
        score_boxes([GOOD | changes], [GOOD])
    if "scores" not in changes:
        with pytest.raises(ValueError, match=message.replace("prediction", "reference")):
            score_boxes([GOOD], [GOOD | changes])


def test_lists_and_iou():
    with pytest.raises(ValueError, match="1 predictions but 2 references"):
        score_boxes([GOOD], [GOOD, GOOD])
    with pytest.raises(ValueError, match=r"iou is 1\.5"):
        score_boxes([GOOD], [GOOD], iou=1.5)


def test_it_brings_no_model_and_no_text():
    code = "import sys, switchkd.evaluation.detection; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "switchkd.evaluation.generate"} & set(loaded)
