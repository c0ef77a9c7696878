"""What a run trains on and is judged on, by the configuration's data section: labelled pictures, or conversations.

`load_images` ends before any text is written; `load_conversations` goes on from its pictures, or reads files of text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from switchkd.config import filled_in
from switchkd.data.bad_samples import keep_good
from switchkd.data.classes import refuse_alike
from switchkd.data.config import DataConfig, MixtureConfig
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

Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageSets:
    """Labelled pictures to train on and to judge on, and the classes that their labels name."""

    train: list[DefectImage]
    test: list[DefectImage]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ConversationSets:
    """`train`: conversations of one or several turns. `test`: single questions, each with its kind."""

    train: list[Conversation]
    test: list[Conversation]


def load_images(config: DataConfig) -> ImageSets:
    """The labelled pictures of both parts, and of the further training parts of `config.mixture`; of each part, up to
    the share `config.max_bad_rate` may be bad and is left out. Without a test split the test part is empty.

    classes: of the whole training split, sorted, whichever pictures are picked; steel's in their own order; then those
        that only the mixture has. Of a part's pictures each is there as often as its weight says.
    Raises ValueError or FileNotFoundError naming the field or file that is wrong, and ValueError for parts that are
    conversations.
    """
    main = _main_images(config)
    further = [_part_images(config, number) for number in range(len(config.mixture))]
    _refuse_alike(config, main, dict(enumerate(further)))
    train = list(main.train)
    for number, part in enumerate(further):
        train += _weighted(part.train, config, number)
    others = {name for part in further for name in part.classes} - set(main.classes)
    return ImageSets(train, main.test, (*main.classes, *sorted(others)))


def load_conversations(config: DataConfig) -> ConversationSets:
    """The conversations of both parts: read from their files, or asked about the labelled pictures. Parts, shares and
    errors as in `load_images`."""
    pictures = _main_images(config) if config.source in ("steel", "voc") else None
    main = _main_files(config) if pictures is None else _asked(pictures, config)
    further = {n: _part_images(config, n) for n, part in enumerate(config.mixture) if part.source == "voc"}
    _refuse_alike(config, pictures, further)
    train = list(main.train)
    for number in range(len(config.mixture)):
        part = _asked(further[number], config).train if number in further else _part_file(config, number)
        train += _weighted(part, config, number)
    return ConversationSets(train, main.test)


def _main_images(config: DataConfig) -> ImageSets:
    judged = config.test_split is not None
    if config.source == "steel":
        train = steel_part(config, TRAIN_STREAM, config.train_images)
        return ImageSets(train, steel_part(config, TEST_STREAM, config.test_images) if judged else [], CLASSES)
    if config.source != "voc":
        raise ValueError(f"data.source is {config.source}, which has no labelled pictures: give voc or steel")
    root, seed = config.folder(), config.image_seed
    train = _read_voc(root, config.train_split, config)
    test = _read_voc(root, config.test_split, config) if judged else []
    # Of the whole split, so that the questions do not change with the number of images.
    classes = _classes(train, _train_name(config))
    _check_classes(test, classes, config)
    return ImageSets(_picked(train, config.train_images, seed), _picked(test, config.test_images, seed), classes)


def _main_files(config: DataConfig) -> ConversationSets:
    root, seed = config.folder(), config.image_seed
    train = _read_file(config.source, config.train_split, root, config, "data.train_split")
    test = []
    if config.test_split is not None:
        test = _read_file(config.source, config.test_split, root, config, "data.test_split")
    picked = _picked(test, config.test_images, seed)
    return ConversationSets(_picked(train, config.train_images, seed), _questions(picked, config))


def _part(config: DataConfig, number: int) -> tuple[MixtureConfig, str, Path]:
    """One part of the mixture, its name in messages, and its folder."""
    part, name = config.mixture[number], f"data.mixture[{number}]"
    root = filled_in(part.root, f"{name}.root")
    if not root.is_dir():
        raise FileNotFoundError(f"{name}.root is {root}, which is not a folder: give the folder of the data")
    return part, name, root


def _part_images(config: DataConfig, number: int) -> ImageSets:
    part, name, root = _part(config, number)
    if part.source != "voc":
        raise ValueError(f"{name}.source is {part.source}, which has no labelled pictures: give voc")
    images = _read_voc(root, part.split, config)
    return ImageSets(images, [], _classes(images, f"{name}.split {part.split}"))


def _part_file(config: DataConfig, number: int) -> list[Conversation]:
    part, name, root = _part(config, number)
    return _read_file(part.source, part.split, root, config, f"{name}.split")


def _refuse_alike(config: DataConfig, main: ImageSets | None, further: Mapping[int, ImageSets]) -> None:
    """Raises as `refuse_alike` for the classes of all parts that are pictures, `further` by their numbers."""
    named = [(name, _train_name(config)) for name in (main.classes if main else ())]
    for number, part in further.items():
        named += [(name, f"data.mixture[{number}] {config.mixture[number].split}") for name in part.classes]
    refuse_alike(named)


def _asked(images: ImageSets, config: DataConfig) -> ConversationSets:
    """The questions about the pictures. Several turns an image share one pass of the vision tower; judging asks each
    question alone."""
    seed, kinds = config.image_seed, config.kinds
    train = join_turns(to_conversations(images.train, images.classes, seed, kinds=kinds), shuffle_seed=seed)
    return ConversationSets(train, list(to_conversations(images.test, images.classes, seed, kinds=kinds)))


def _weighted(items: list[Item], config: DataConfig, number: int) -> list[Item]:
    """Each item of a part of the mixture as often as its weight says; of what is over, that share of them at random,
    at least one in all."""
    weight, seed = config.mixture[number].weight, f"{config.image_seed}/{number}"
    whole = int(weight)
    share = round((weight - whole) * len(items))
    count = share if whole else max(share, 1)
    return items * whole + (_picked(items, count, seed) if count else [])


def steel_part(config: DataConfig, stream: int, count: int | None) -> list[DefectImage]:
    """`count` rendered pictures of one stream of `config.image_seed`."""
    if count is None:
        raise ValueError("data.source is steel: give data.train_images and data.test_images, there is no natural end")
    return render_steel(count, seed=10 * config.image_seed + stream)


def _read_voc(root: Path, split: str, config: DataConfig) -> list[DefectImage]:
    rules = {"max_bad_rate": config.max_bad_rate, "first_pixel": config.first_pixel}
    return list(read_defects(root, split=split, **rules))


def _train_name(config: DataConfig) -> str:
    return "data.source steel" if config.source == "steel" else f"data.train_split {config.train_split}"


def _classes(train: Sequence[DefectImage], where: str) -> tuple[str, ...]:
    classes = tuple(sorted({label for image in train for label in image.labels}))
    if not classes:
        raise ValueError(f"{where}: no image has a box, so there is no class to ask for")
    refuse_alike((name, where) for name in classes)
    return classes


def _check_classes(test: Sequence[DefectImage], classes: Sequence[str], config: DataConfig) -> None:
    for image in test:
        for label in image.labels:
            if label not in classes:
                where = f"data.test_split {config.test_split}: {image.id}"
                refuse_alike([*((name, _train_name(config)) for name in classes), (label, where)])
                raise ValueError(
                    f"{where} has class {label!r}, which no image of {_train_name(config)} has; its classes are"
                    f" {', '.join(classes)}: correct the label, or choose splits of the same classes"
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


def _picked(items: list[Item], count: int | None, seed: int | str) -> list[Item]:
    """`count` of the items at random, in their order; all where `count` is None or there are no more."""
    if count is None or count >= len(items):
        return items
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[index] for index in sorted(chosen)]
