"""Defect images -> question and answer pairs: exists, classify, count, locate.

Boxes in questions and answers are integers 0-1000 of the image's width and height, `[x1, y1, x2, y2]`. Class
names are shown with spaces for underscores ("pitted_surface" -> "pitted surface"). All of this is ours; the
0-1000 grid is the one that Qwen-VL and Shikra-like models use.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from switchkd.data.classes import refuse_alike
from switchkd.data.conversations.conversation import Conversation
from switchkd.data.defects import DefectImage

KINDS = ("exists", "classify", "count", "locate")

EXISTS = ("Is there any {name} in the image?", "Does the image show {name}?", "Do you see {name} here?")
CLASSIFY = ("Which defect is in the image?", "What kind of defect is this?", "Name the defects you see.")
COUNT = ("How many {name} are there?", "Count the {name} in the image.")
LOCATE_ALL = ("Locate every defect.", "Where are the defects?")
LOCATE_ONE = ("Locate all {name}.", "Where is the {name}?")

GRID = 1000
NONE = "none"
PRESENT_SHARE = 0.75  # how often count and locate name a class that the image holds, where both choices exist


def box_to_grid(box: Sequence[float], width: int, height: int) -> list[int]:
    """A half-open pixel box (x1, y1, x2, y2) as integers 0-1000 of `width` and `height`.

    Rounded outward (floor, floor, ceil, ceil) and clamped, so that it covers the box and is never empty.
    Raises ValueError when no part of the box lies in the image.
    """
    x1, y1, x2, y2 = box
    if not (max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
        raise ValueError(
            f"box {list(box)} has no area inside the {width}x{height} image:"
            " a box is (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2"
        )
    return [
        max(math.floor(x1 * GRID / width), 0),
        max(math.floor(y1 * GRID / height), 0),
        min(math.ceil(x2 * GRID / width), GRID),
        min(math.ceil(y2 * GRID / height), GRID),
    ]


def grid_to_box(grid: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The pixel box (x1, y1, x2, y2) of a 0-1000 box; inverse of `box_to_grid` up to its rounding."""
    x1, y1, x2, y2 = grid
    return x1 * width / GRID, y1 * height / GRID, x2 * width / GRID, y2 * height / GRID


def shown(name: str) -> str:
    """A class name as questions and answers write it: spaces for underscores."""
    return name.replace("_", " ")


def to_conversations(
    defect_images: Iterable[DefectImage],
    classes: Sequence[str],
    seed: int = 0,
    *,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Conversation]:
    """One question of each kind about each image, images in the order given.

    The same seed gives an image the same questions whatever the order of the images. `exists` is planned over
    the whole set, so that yes and no are equally frequent, over all and for each class, as far as the set
    allows it. `count` and `locate` name an absent class in a quarter of the images that leave the choice.

    Raises ValueError, before the first conversation, for an unknown kind, classes that differ only in form
    (`refuse_alike`), a label that is not in `classes`, and two images of one id.
    """
    images, classes = list(defect_images), list(classes)
    _check(images, classes, kinds)
    asked = plan_exists(images, classes, seed) if "exists" in kinds else {}

    def generate() -> Iterator[Conversation]:
        for image in images:
            for kind in kinds:
                rng = _rng(seed, image, kind)
                if kind == "exists":
                    yield exists(image, asked[image.id], rng)
                elif kind == "classify":
                    yield classify(image, classes, rng)
                elif kind == "count":
                    yield count(image, _some_class(image, classes, rng), rng)
                else:
                    yield locate(image, None if rng.random() < 0.5 else _some_class(image, classes, rng), rng)

    return generate()


def exists(image: DefectImage, name: str, rng: random.Random) -> Conversation:
    """Is there any of class `name`: "yes" or "no"."""
    answer = "yes" if name in image.labels else "no"
    return _conversation(image, "exists", name, rng.choice(EXISTS), answer)


def classify(image: DefectImage, classes: Sequence[str], rng: random.Random) -> Conversation:
    """Which classes the image holds, in the order of `classes`, joined by ", "; "none" for none."""
    answer = ", ".join(shown(name) for name in classes if name in image.labels) or NONE
    return _conversation(image, "classify", None, rng.choice(CLASSIFY), answer)


def count(image: DefectImage, name: str, rng: random.Random) -> Conversation:
    """How many boxes of class `name`, as digits."""
    return _conversation(image, "count", name, rng.choice(COUNT), str(image.labels.count(name)))


def locate(image: DefectImage, name: str | None, rng: random.Random) -> Conversation:
    """Where the boxes of class `name` (None: of every class) are, as `located` writes them."""
    question = rng.choice(LOCATE_ALL if name is None else LOCATE_ONE)
    return _conversation(image, "locate", name, question, located(image, name))


def located(image: DefectImage, name: str | None = None) -> str:
    """JSON of the image's boxes of class `name` (None: all), top to bottom, then left to right."""
    found = [
        (box_to_grid(box, image.width, image.height), shown(label))
        for box, label in zip(image.boxes, image.labels, strict=True)
        if name is None or label == name
    ]
    found.sort(key=lambda item: (item[0][1], item[0][0], item[0], item[1]))
    return json.dumps([{"label": label, "bbox": grid} for grid, label in found], ensure_ascii=False)


def plan_exists(images: Sequence[DefectImage], classes: Sequence[str], seed: int) -> dict[str, str]:
    """Image id -> the class to ask for, with as many "yes" as "no" as the set allows.

    Images without any class can only be asked with "no", images with all classes only with "yes"; the others
    fill up the rarer answer. Among the absent classes the one whose "no" lag most behind its "yes" is taken,
    so that the question alone does not give the answer away.
    """
    order = sorted(images, key=lambda image: (_rng(seed, image, "plan").random(), image.id))
    present = {image.id: [name for name in classes if name in image.labels] for image in order}
    must_yes = {image.id for image in order if len(present[image.id]) == len(classes)}
    must_no = {image.id for image in order if not present[image.id]}
    free = [image.id for image in order if image.id not in must_yes | must_no]
    yes_of_free = min(max((len(order) + 1) // 2 - len(must_yes), 0), len(free))
    say_yes = must_yes | set(free[:yes_of_free])

    asked, surplus = {}, Counter()  # surplus of a class: its questions answered yes minus those answered no
    for image in order:
        if image.id in say_yes:
            name = _rng(seed, image, "exists yes").choice(present[image.id])
            asked[image.id] = name
            surplus[name] += 1
    for image in order:
        if image.id not in say_yes:
            rng = _rng(seed, image, "exists no")
            absent = [name for name in classes if name not in present[image.id]]
            name = max(absent, key=lambda name: (surplus[name], rng.random()))
            asked[image.id] = name
            surplus[name] -= 1
    return asked


def _conversation(image: DefectImage, kind: str, name: str | None, question: str, answer: str) -> Conversation:
    question = question.format(name=shown(name)) if name else question
    return Conversation(
        id=f"{image.id}/{kind}/{name}" if name else f"{image.id}/{kind}",
        messages=[
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        images=[image.image if image.image is not None else image.image_path],
        kind=kind,
    )


def _some_class(image: DefectImage, classes: Sequence[str], rng: random.Random) -> str:
    present = [name for name in classes if name in image.labels]
    absent = [name for name in classes if name not in image.labels]
    ask_present = rng.random() < PRESENT_SHARE
    return rng.choice(present if (ask_present and present) or not absent else absent)


def _rng(seed: int, image: DefectImage, purpose: str) -> random.Random:
    # Seeded by text: the same on every machine, and no image's draw depends on another's.
    return random.Random(f"{seed}/{image.id}/{purpose}")


def _check(images: Sequence[DefectImage], classes: Sequence[str], kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds={list(kinds)}: name at least one, each of {', '.join(KINDS)}")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes={list(classes)}: give at least one, each once")
    refuse_alike((name, "classes") for name in classes)
    seen = set()
    for image in images:
        where = image.image_path or image.id
        if image.id in seen:
            raise ValueError(f"two images have the id {image.id!r} (second: {where}): give each its own id")
        seen.add(image.id)
        for label in image.labels:
            if label not in classes:
                raise ValueError(
                    f"{where}: unknown class {label!r}; known classes are {', '.join(classes)}."
                    " Add it to `classes` or correct the label."
                )
