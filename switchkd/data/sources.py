"""What a run trains on and is judged on: training and test conversations by the configuration's data section."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from switchkd.config import filled_in
from switchkd.data.bad_samples import keep_good
from switchkd.data.config import DataConfig
from switchkd.data.conversations.conversation import Conversation, check_conversation
from switchkd.data.conversations.instruct import to_conversations
from switchkd.data.conversations.llava import read_llava
from switchkd.data.conversations.messages import read_messages
from switchkd.data.conversations.turns import join_turns
from switchkd.data.defects import DefectImage
from switchkd.data.layouts.read import read_defects
from switchkd.data.steel import CLASSES, render_steel

# Rendered parts never share a picture: each has a stream of its own, and `recipes/make_tiny.py` has 2 and 3.
TRAIN_STREAM, TEST_STREAM = 0, 1


@dataclass(frozen=True)
class Source:
    """`train`: conversations of one or several turns. `test`: single questions, each with its kind."""

    train: list[Conversation]
    test: list[Conversation]


def load_conversations(config: DataConfig) -> Source:
    """Reads or renders both parts, and the further training parts of `config.mixture`; of each part, up to the share
    `config.max_bad_rate` may be bad and is left out. Without a test split the test part is empty.

    Raises ValueError or FileNotFoundError naming the field or file that is wrong.
    """
    main = _main(config)
    further = [each for number in range(len(config.mixture)) for each in _part(config, number)]
    return Source(main.train + further, main.test)


def _main(config: DataConfig) -> Source:
    judged = config.test_split is not None
    if config.source == "steel":
        test = steel_part(config, TEST_STREAM, config.test_images) if judged else []
        return _from_defects([steel_part(config, TRAIN_STREAM, config.train_images), test], CLASSES, config)
    root, seed = config.folder(), config.image_seed
    if config.source == "voc":
        train = _read_voc(root, config.train_split, config)
        test = _read_voc(root, config.test_split, config) if judged else []
        # Of the whole split, so that the questions do not change with the number of images.
        classes = _classes(train, f"data.train_split {config.train_split}")
        _check_classes(test, classes, config)
        parts = [_picked(train, config.train_images, seed), _picked(test, config.test_images, seed)]
        return _from_defects(parts, classes, config)
    train = _read_file(config.source, config.train_split, root, config, "data.train_split")
    test = _read_file(config.source, config.test_split, root, config, "data.test_split") if judged else []
    picked = _picked(test, config.test_images, seed)
    return Source(_picked(train, config.train_images, seed), _questions(picked, config))


def _part(config: DataConfig, number: int) -> list[Conversation]:
    part, name = config.mixture[number], f"data.mixture[{number}]"
    root = filled_in(part.root, f"{name}.root")
    if not root.is_dir():
        raise FileNotFoundError(f"{name}.root is {root}, which is not a folder: give the folder of the data")
    if part.source == "voc":
        images = _read_voc(root, part.split, config)
        classes = _classes(images, f"{name}.split {part.split}")
        conversations = _from_defects([images, []], classes, config).train
    else:
        conversations = _read_file(part.source, part.split, root, config, f"{name}.split")
    return _weighted(conversations, part.weight, f"{config.image_seed}/{number}")


def _weighted(conversations: list[Conversation], weight: float, seed: str) -> list[Conversation]:
    """Each conversation `weight` times; of what is over, that share of them at random, at least one in all."""
    whole = int(weight)
    share = round((weight - whole) * len(conversations))
    count = share if whole else max(share, 1)
    return conversations * whole + (_picked(conversations, count, seed) if count else [])


def steel_part(config: DataConfig, stream: int, count: int | None) -> list[DefectImage]:
    """`count` rendered pictures of one stream of `config.image_seed`."""
    if count is None:
        raise ValueError("data.source is steel: give data.train_images and data.test_images, there is no natural end")
    return render_steel(count, seed=10 * config.image_seed + stream)


def _read_voc(root: Path, split: str, config: DataConfig) -> list[DefectImage]:
    rules = {"max_bad_rate": config.max_bad_rate, "first_pixel": config.first_pixel}
    return list(read_defects(root, split=split, **rules))


def _from_defects(parts: Sequence[list[DefectImage]], classes: Sequence[str], config: DataConfig) -> Source:
    train, test = parts
    seed, kinds = config.image_seed, config.kinds
    # Several turns an image share one pass of the vision tower. Judging asks each question alone.
    turns = join_turns(to_conversations(train, classes, seed, kinds=kinds), shuffle_seed=seed)
    return Source(turns, list(to_conversations(test, classes, seed, kinds=kinds)))


def _classes(train: Sequence[DefectImage], name: str) -> list[str]:
    classes = sorted({label for image in train for label in image.labels})
    if not classes:
        raise ValueError(f"{name}: no image has a box, so there is no class to ask for")
    return classes


def _check_classes(test: Sequence[DefectImage], classes: Sequence[str], config: DataConfig) -> None:
    for image in test:
        for label in image.labels:
            if label not in classes:
                raise ValueError(
                    f"data.test_split {config.test_split}: {image.id} has class {label!r}, which no image of "
                    f"data.train_split {config.train_split} has; its classes are {', '.join(classes)}: correct the "
                    "label, or choose splits of the same classes"
                )


def _read_file(source: str, split: str, root: Path, config: DataConfig, field: str) -> list[Conversation]:
    path = filled_in(split, field)
    if not path.is_file() and not (source == "messages" and path.is_dir()):
        raise FileNotFoundError(f"{field} is {path}, which is not a file: give the file of conversations")
    read = read_llava if source == "llava" else read_messages
    conversations = list(read(path, root, max_bad_rate=config.max_bad_rate))
    if not conversations:
        raise ValueError(f"{field}: {path} holds no conversation")
    return conversations


def _questions(conversations: list[Conversation], config: DataConfig) -> list[Conversation]:
    """Those that can be asked and judged: found out here, not after the training."""
    name = config.test_split

    def check(conversation: Conversation) -> Conversation:
        if [message["role"] for message in conversation.messages[-2:]] != ["user", "assistant"]:
            raise ValueError(
                f"{name}: conversation {conversation.id!r} does not end in a question and its answer, so that it "
                "cannot be judged: remove what follows the answer, or add the answer"
            )
        return check_conversation(conversation)

    return keep_good(conversations, check, max_bad_rate=config.max_bad_rate, what=name)


Item = TypeVar("Item")


def _picked(items: list[Item], count: int | None, seed: int | str) -> list[Item]:
    """`count` of the items at random, in their order; all where `count` is None or there are no more."""
    if count is None or count >= len(items):
        return items
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[index] for index in sorted(chosen)]
