import json
import random
from collections import Counter

import pytest
from PIL import Image

from switchkd.data import DefectImage, box_to_grid, grid_to_box, to_conversations
from switchkd.data.conversations import instruct

CLASSES = ["crazing", "pitted_surface", "rolled-in_scale"]


def defect(name, *found, width=200, height=100):
    """A DefectImage; each of `found` is a label or a (label, box) pair."""
    found = [(each, (10, 10, 20, 20)) if isinstance(each, str) else each for each in found]
    return DefectImage(
        None,
        width,
        height,
        tuple(box for _, box in found),
        tuple(label for label, _ in found),
        image=Image.new("RGB", (width, height)),
        id=name,
    )


@pytest.fixture
def mixed():
    """90 images: a third without defects, the others with one or two of the classes."""
    rng = random.Random(7)
    return [defect(f"m{i}", *rng.sample(CLASSES, rng.choice([0, 1, 2]))) for i in range(90)]


def test_box_to_grid_rounds_outward_and_never_empties():
    assert box_to_grid((1, 2, 3, 5), 7, 11) == [142, 181, 429, 455]  # 142.9, 181.8, 428.6, 454.5
    assert box_to_grid((0, 0, 200, 100), 200, 100) == [0, 0, 1000, 1000]
    assert box_to_grid((10, 10, 20, 20), 200, 100) == [50, 100, 100, 200]  # exact values do not grow
    assert box_to_grid((5000, 5000, 5001, 5001), 8000, 8000) == [625, 625, 626, 626]
    assert box_to_grid((-5, 3, 9, 12), 8, 8) == [0, 375, 1000, 1000]
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(1, 3000), rng.randint(1, 3000)
        x, y = rng.random() * width * 0.999, rng.random() * height * 0.999
        box = (x, y, min(x + rng.random(), width), min(y + rng.random(), height))
        x1, y1, x2, y2 = grid = box_to_grid(box, width, height)
        assert 0 <= x1 < x2 <= 1000
        assert 0 <= y1 < y2 <= 1000
        back = grid_to_box(grid, width, height)
        assert back[0] <= box[0] + 1e-9
        assert back[1] <= box[1] + 1e-9
        assert back[2] >= box[2] - 1e-9
        assert back[3] >= box[3] - 1e-9


@pytest.mark.parametrize("box", [(3, 3, 3, 9), (9, 3, 3, 9), (100, 0, 110, 5)])
def test_box_to_grid_refuses_what_has_no_area_in_the_image(box):
    with pytest.raises(ValueError, match="no area inside the 50x50 image"):
        box_to_grid(box, 50, 50)


def test_each_kind_gives_its_answer():
    image = defect(
        "a", ("pitted_surface", (100, 50, 150, 60)), ("crazing", (30, 5, 60, 25)), ("crazing", (2, 5, 11, 25))
    )
    rng = random.Random(0)
    assert instruct.exists(image, "crazing", rng).answer == "yes"
    assert instruct.exists(image, "rolled-in_scale", rng).answer == "no"
    assert "rolled-in scale" in instruct.exists(image, "rolled-in_scale", rng).question
    assert instruct.classify(image, CLASSES, rng).answer == "crazing, pitted surface"
    assert instruct.classify(defect("b"), CLASSES, rng).answer == "none"
    assert instruct.count(image, "crazing", rng).answer == "2"
    assert instruct.count(image, "rolled-in_scale", rng).answer == "0"
    # Top to bottom, then left to right, whatever the order of the labels.
    assert instruct.locate(image, None, rng).answer == (
        '[{"label": "crazing", "bbox": [10, 50, 55, 250]}, {"label": "crazing", "bbox": [150, 50, 300, 250]},'
        ' {"label": "pitted surface", "bbox": [500, 500, 750, 600]}]'
    )
    assert json.loads(instruct.locate(image, "pitted_surface", rng).answer) == [
        {"label": "pitted surface", "bbox": [500, 500, 750, 600]}
    ]
    assert instruct.locate(image, "rolled-in_scale", rng).answer == "[]"
    assert instruct.locate(defect("b"), None, rng).answer == "[]"


def test_form_of_a_conversation():
    image = defect("a", "crazing")
    one = next(to_conversations([image], CLASSES, kinds=["classify"]))
    assert one.id == "a/classify"
    assert one.kind == "classify"
    assert one.images == [image.image]
    assert [message["role"] for message in one.messages] == ["user", "assistant"]
    assert one.messages[0]["content"][0] == {"type": "image"}
    assert one.question in instruct.CLASSIFY


def test_one_question_of_each_kind_and_unique_ids(mixed):
    made = list(to_conversations(mixed, CLASSES))
    assert [each.kind for each in made] == list(instruct.KINDS) * 90
    assert len({each.id for each in made}) == 360


def test_answers_agree_with_the_labels(mixed):
    by_id = {image.id: image for image in mixed}
    for each in to_conversations(mixed, CLASSES, seed=3):
        image, name = by_id[each.id.split("/")[0]], each.id.split("/")[-1]
        if each.kind == "exists":
            assert each.answer == ("yes" if name in image.labels else "no")
        elif each.kind == "count":
            assert each.answer == str(image.labels.count(name))
        elif each.kind == "locate":
            expected = [label for label in image.labels if name in (label, "locate")]
            found = [item["label"] for item in json.loads(each.answer)]
            assert sorted(found) == sorted(label.replace("_", " ") for label in expected)


def test_exists_is_balanced_and_the_question_does_not_tell(mixed):
    asked = [(each.id.split("/")[-1], each.answer) for each in to_conversations(mixed, CLASSES, kinds=["exists"])]
    answers = Counter(answer for _, answer in asked)
    assert answers == {"yes": 45, "no": 45}
    for name in CLASSES:
        counts = Counter(answer for each, answer in asked if each == name)
        assert abs(counts["yes"] - counts["no"]) <= 1


def test_exists_where_the_data_leave_no_choice():
    full, bare = [defect(f"f{i}", *CLASSES) for i in range(6)], [defect(f"b{i}") for i in range(2)]
    answers = Counter(each.answer for each in to_conversations(full + bare, CLASSES, kinds=["exists"]))
    assert answers == {"yes": 6, "no": 2}
    some = [defect(f"s{i}", "crazing") for i in range(4)]
    answers = Counter(each.answer for each in to_conversations(full + some, CLASSES, kinds=["exists"]))
    assert answers == {"yes": 6, "no": 4}


def test_count_and_locate_name_absent_classes_sometimes(mixed):
    for kind, nothing in (("count", "0"), ("locate", "[]")):
        defective = [image for image in mixed if image.labels]
        made = list(to_conversations(defective, CLASSES, kinds=[kind]))
        assert 0.05 < sum(each.answer == nothing for each in made) / len(made) < 0.4


def test_seed_decides_and_order_does_not(mixed):
    def asked(images, seed):
        return {each.id: (each.question, each.answer) for each in to_conversations(images, CLASSES, seed)}

    assert asked(mixed, 1) == asked(mixed[::-1], 1)
    assert asked(mixed, 1) != asked(mixed, 2)


def test_all_phrasings_occur_and_know_no_other_field(mixed):
    questions = {each.question for seed in range(4) for each in to_conversations(mixed, CLASSES, seed)}
    for template in (
        *instruct.EXISTS,
        *instruct.CLASSIFY,
        *instruct.COUNT,
        *instruct.LOCATE_ALL,
        *instruct.LOCATE_ONE,
    ):
        assert any(template.format(name=instruct.shown(name)) in questions for name in CLASSES)
    assert not any("_" in question or "{" in question for question in questions)


def test_unknown_class_names_the_class_the_known_ones_and_the_file(tmp_path):
    image = DefectImage(tmp_path / "plate_7.jpg", 9, 9, ((1, 1, 2, 2),), ("rust",))
    with pytest.raises(ValueError, match=r"plate_7\.jpg: unknown class 'rust'; known classes are crazing, pitt"):
        to_conversations([image], CLASSES)


def test_other_errors():
    with pytest.raises(ValueError, match="two images have the id 'a'"):
        to_conversations([defect("a"), defect("a")], CLASSES)
    with pytest.raises(ValueError, match=r"kinds=\['describe'\]: name at least one, each of exists, classify"):
        to_conversations([defect("a")], CLASSES, kinds=["describe"])
    with pytest.raises(ValueError, match="each once"):
        to_conversations([defect("a")], ["a_b", "a_b"])
