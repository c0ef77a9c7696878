import contextlib
import io
import json
import random

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from switchkd.evaluation import Answer, all_found, box_scores, parse_boxes, score_detections


def located(*boxes) -> str:
    return json.dumps([{"label": label, "bbox": list(box)} for label, *box in boxes])


A = ("crack", 100, 100, 200, 200)
B = ("patch", 500, 500, 700, 700)
FAR = ("crack", 800, 800, 900, 900)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[]", []),
        (' [{"label": "a b", "bbox": [0, 1.5, 1000, 2]}]\n', [("a b", [0.0, 1.5, 1000.0, 2.0])]),
        ('[{"bbox": [1, 2, 3, 4], "label": "{x}"}]', [("{x}", [1.0, 2.0, 3.0, 4.0])]),
    ],
)
def test_parse_boxes(text, boxes):
    assert parse_boxes(text) == boxes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "{}",
        '"[]"',
        "[] []",
        "Boxes: []",
        "```json\n[]\n```",
        "[1]",
        "[[]]",
        '[{"label": "a", "bbox": [1, 2, 3, 4]},]',
        "[{'label': 'a', 'bbox': [1, 2, 3, 4]}]",
        '[{"label": "a", "bbox": [1, 2, 3, 4]}',
        '[{"label": "a"}]',
        '[{"label": "a", "bbox": [1, 2, 3, 4], "score": 1}]',
        '[{"label": "a", "label": "b", "bbox": [1, 2, 3, 4]}]',
        '[{"label": 1, "bbox": [1, 2, 3, 4]}]',
        '[{"label": " ", "bbox": [1, 2, 3, 4]}]',
        '[{"label": "a", "bbox": [1, 2, 3]}]',
        '[{"label": "a", "bbox": [1, 2, 3, 4, 5]}]',
        '[{"label": "a", "bbox": "1234"}]',
        '[{"label": "a", "bbox": [1, 2, 3, "4"]}]',
        '[{"label": "a", "bbox": [false, 2, true, 4]}]',
        '[{"label": "a", "bbox": [1, 2, 3, null]}]',
        '[{"label": "a", "bbox": [1, 2, 3, 1001]}]',
        '[{"label": "a", "bbox": [-1, 2, 3, 4]}]',
        '[{"label": "a", "bbox": [1, 2, 1, 4]}]',
        '[{"label": "a", "bbox": [1, 4, 3, 2]}]',
        '[{"label": "a", "bbox": [1, 2, NaN, 4]}]',
        '[{"label": "a", "bbox": [1, 2, 1e999, 4]}]',
        '[{"label": "a", "bbox": [1, 2, __import__("os"), 4]}]',
        "[" * 100_000,
    ],
)
def test_malformed_answers_have_no_boxes(text):
    assert parse_boxes(text) is None


def test_perfect_answers():
    scores = score_detections([located(A, B), "[]"], [located(B, A), []])
    assert (scores["ap50"], scores["ap"], scores["f1"], scores["malformed"]) == pytest.approx((1, 1, 1, 0))
    assert (scores["precision"], scores["recall"]) == (1, 1)
    assert scores["ap50_by_label"] == pytest.approx({"crack": 1, "patch": 1})
    assert scores["counts"] == {
        "pictures": 2,
        "references": 2,
        "predictions": 2,
        "true_positives": 2,
        "false_positives": 0,
        "false_negatives": 0,
        "unknown_labels": 0,
    }


@pytest.mark.parametrize(("first", "second", "ap50"), [(0.9, 0.3, 1.0), (0.3, 0.9, 0.5)])
def test_a_false_positive_costs_average_precision_by_its_rank(first, second, ap50):
    scores = score_detections([(located(A, FAR), [first, second])], [located(A)])
    assert scores["ap50"] == pytest.approx(ap50)
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((0.5, 1.0, 2 / 3))


def test_average_precision_ranks_over_all_pictures():
    # Ranks TP, FP, TP of two references: precision 1 up to recall 0.5 (51 of COCO's 101 points), then 2/3.
    predictions = [(located(A, FAR), [0.9, 0.5]), (located(A), [0.4])]
    scores = score_detections(predictions, [located(A), located(A)])
    assert scores["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    best = score_detections([(located(A, FAR), [0.9, 0.3]), (located(A), [0.4])], [located(A), located(A)])
    assert best["ap50"] == pytest.approx(1.0)
    assert best["f1"] == scores["f1"] == pytest.approx(0.8)


# A box of width 100 moved by d overlaps (100 - d) / (100 + d): 34.2 gives IoU 0.4903, 32.5 gives 0.5094.
@pytest.mark.parametrize(("shift", "found"), [(34.2, 0.0), (32.5, 1.0)])
def test_a_box_is_found_from_iou_one_half(shift, found):
    scores = score_detections([located(("crack", 100 + shift, 100, 200 + shift, 200))], [located(A)])
    assert (scores["ap50"], scores["f1"], scores["recall"]) == pytest.approx((found, found, found))
    assert scores["ap"] == pytest.approx(found / 10)  # of 0.50:0.95 only the first threshold is met


def test_iou_is_the_threshold_of_f1_alone():
    shifted = [located(("crack", 110, 100, 210, 200))]  # IoU 90 / 110 = 0.818
    scores = {iou: score_detections(shifted, [located(A)], iou=iou) for iou in (0.81, 0.83, 1.0)}
    assert [scores[iou]["f1"] for iou in scores] == [1.0, 0.0, 0.0]
    assert [scores[iou]["ap"] for iou in scores] == pytest.approx([0.7] * 3)
    assert score_detections([located(A)], [located(A)], iou=1.0)["f1"] == 1.0


def test_a_wrong_label_is_a_false_positive_and_a_miss():
    scores = score_detections([located(("patch", *A[1:]))], [located(A)])
    assert (scores["ap50"], scores["f1"]) == (0, 0)
    assert scores["counts"]["false_positives"] == scores["counts"]["false_negatives"] == 1
    assert scores["counts"]["unknown_labels"] == 1


def test_a_label_that_no_reference_has_counts_against_precision():
    scores = score_detections([located(A, ("rust", 1, 1, 2, 2))], [located(A)])
    assert scores["precision"] == 0.5
    assert scores["counts"]["unknown_labels"] == 1
    assert scores["ap50_by_label"] == pytest.approx({"crack": 1})


def test_labels_compare_without_case_and_outer_spaces():
    assert score_detections([located((" Crack", *A[1:]))], [located(A)])["f1"] == 1.0


def test_a_duplicate_is_a_false_positive():
    scores = score_detections([(located(A, A), [0.5, 0.9]), (located(A), [0.1])], [located(A), located(A)])
    assert scores["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (scores["precision"], scores["recall"]) == pytest.approx((2 / 3, 1.0))


def test_each_box_takes_the_free_reference_it_overlaps_most():
    left, right = ("crack", 100, 100, 200, 200), ("crack", 130, 100, 230, 200)
    scores = score_detections([(located(right, left), [0.9, 0.8])], [located(left, right)])
    assert scores["counts"]["true_positives"] == 2


def test_boxes_of_higher_score_choose_first():
    # The claim between overlaps both references (IoU 0.67, 0.54), the exact one only the first (1.0, 0.33).
    references = [located(("crack", 100, 100, 200, 200), ("crack", 150, 100, 250, 200))]
    claims = located(("crack", 120, 100, 220, 200), ("crack", 100, 100, 200, 200))
    between_first = score_detections([(claims, [0.9, 0.1])], references)
    exact_first = score_detections([(claims, [0.1, 0.9])], references)
    assert between_first["counts"]["true_positives"] == 1
    assert exact_first["counts"]["true_positives"] == 2


def test_true_positives_agree_with_coco():
    rng = random.Random(0)

    def boxes(n):
        corners = [(rng.randint(0, 120), rng.randint(0, 120)) for _ in range(n)]
        return [("crack", x, y, x + rng.randint(40, 90), y + rng.randint(40, 90)) for x, y in corners]

    references = [located(*boxes(4)) for _ in range(40)]
    predictions = [(located(*boxes(6)), [rng.random() for _ in range(6)]) for _ in range(40)]
    found = score_detections(predictions, references)["counts"]["true_positives"]
    assert 20 < found < 140
    assert found == _coco_true_positives(predictions, references)


def _coco_true_positives(predictions, references) -> int:
    def dataset(texts, scores=None):
        coco = COCO()
        annotations = []
        for image, text in enumerate(texts):
            for n, (_, (x1, y1, x2, y2)) in enumerate(parse_boxes(text)):
                annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": 0, "iscrowd": 0}
                annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                annotations.append(annotation | {"score": scores[image][n] if scores else 0})
        images = [{"id": image} for image in range(len(texts))]
        coco.dataset = {"images": images, "categories": [{"id": 0}], "annotations": annotations}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        texts, scores = zip(*predictions, strict=True)
        evaluation = COCOeval(dataset(references), dataset(texts, scores), "bbox")
        evaluation.evaluate()
    return sum(
        int((image["dtMatches"][0] > 0).sum())
        for image in evaluation.evalImgs
        if image is not None and image["aRng"] == evaluation.params.areaRng[0]
    )


def test_malformed_answers_miss_everything_and_are_counted():
    scores = score_detections([located(A), "crack at 100", ("[{", [0.5])], [located(A), located(A), "[]"])
    assert scores["malformed"] == pytest.approx(2 / 3)
    assert (scores["precision"], scores["recall"]) == pytest.approx((1.0, 0.5))
    assert scores["ap50"] == pytest.approx(51 / 101)


def test_more_than_a_hundred_boxes_all_count():
    many = [("crack", n, 0, n + 1, 1) for n in range(150)]
    assert score_detections([located(*many)], [located(*many)])["ap50"] == pytest.approx(1.0)


def test_nothing_to_find():
    empty = score_detections([], [])
    assert (empty["ap50"], empty["ap"], empty["f1"], empty["malformed"]) == (None, None, 1.0, 0.0)
    right = score_detections(["[]"], ["[]"])
    assert (right["f1"], right["precision"], right["recall"], right["ap"]) == (1.0, 1.0, 1.0, None)
    wrong = score_detections([located(A)], ["[]"])
    assert (wrong["f1"], wrong["precision"], wrong["recall"], wrong["ap"]) == (0.0, 0.0, 0.0, None)
    silent = score_detections(["[]"], [located(A)])
    assert (silent["f1"], silent["precision"], silent["recall"], silent["ap"]) == (0.0, 0.0, 0.0, 0.0)


def test_scoring_prints_nothing(capsys):
    score_detections([located(A)], [located(A)])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["[]"], []), "1 predictions but 0 references"),
        ((["[]", "[]"], ["[]", "yes"]), "reference 1 is not a list of boxes .*'yes'"),
        ((["[]"], ['[{"label": "a", "bbox": [5, 2, 3, 4]}]']), "reference 0 .* empty or inverted"),
        ((["[]"], [[{"label": "a", "bbox": [1, 2, 3, 4000]}]]), "reference 0 .* 0 to 1000"),
        ((["[]"], [[{"label": "a"}]]), "reference 0 .* keys"),
        (([(located(A, B), [1.0])], ["[]"]), "prediction 0 has 2 boxes but 1 scores"),
        (([(located(A), [float("nan")])], ["[]"]), "prediction 0 has a score that is no finite number"),
        (([], [], 50), "iou is 50"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_detections(*arguments)


def test_box_scores_are_geometric_means_over_the_tokens_of_each_object():
    first = ['{"label": "a", ', "", '"bbox": [1, 2, 3, 4]']
    pieces = ["[", *first, "}, {", '"label": "b", "bbox": [1, 2, 3, 4]}', "]"]
    probabilities = (0.01, 0.9, 0.001, 0.4, 0.5, 0.2, 0.02)
    spans, end = [], 0
    for piece in pieces:
        spans.append((end, end + len(piece)))
        end += len(piece)
    answer = Answer("".join(pieces), tuple(spans), probabilities)
    assert box_scores(answer) == pytest.approx([(0.9 * 0.4 * 0.5) ** (1 / 3), (0.5 * 0.2) ** (1 / 2)])
    assert box_scores(Answer("[]", ((0, 2),), (0.5,))) == []
    assert box_scores(Answer("[{", ((0, 2),), (0.5,))) == []


@pytest.mark.parametrize(
    "text",
    [located(A), located(A, B, FAR), located(A, A), located(A, FAR), located(A, A, B), "[]", "no boxes"],
)
def test_a_located_answer_is_right_only_as_a_whole(text):
    assert not all_found(text, located(A, B))


def test_a_located_answer_is_right_in_any_order():
    assert all_found(located(B, A), located(A, B))
    assert all_found("[]", [])
    with pytest.raises(ValueError, match="the reference is not a list of boxes"):
        all_found("[]", "none")
