"""What a run trains on and is judged on: training and test conversations by the configuration's data section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switchkd.config import DataConfig
from switchkd.data.conversations import Conversation, join_turns, read_llava, read_messages
from switchkd.data.defects import DefectImage, read_defects
from switchkd.data.instruct import to_conversations
from switchkd.data.steel import CLASSES, render_steel

# Rendered parts never share a picture: each has a stream of its own beside `image_seed`.
TRAIN_STREAM, TEST_STREAM, PRETRAIN_STREAM = 0, 1, 2


@dataclass(frozen=True)
class Source:
    """`train`: conversations of one or several turns. `test`: single questions, each with its kind."""

    train: list[Conversation]
    test: list[Conversation]


def load_source(config: DataConfig) -> Source:
    """Reads or renders both parts. Raises ValueError or FileNotFoundError naming the field or file that is wrong."""
    if config.source == "steel":
        images = [
            steel_part(config, TRAIN_STREAM, config.train_images),
            steel_part(config, TEST_STREAM, config.test_images),
        ]
        return _from_defects(images, CLASSES, config.image_seed)
    root = config.folder()
    if config.source == "voc":
        images = [
            list(read_defects(root, split=split))[:limit]
            for split, limit in (
                (config.train_split, config.train_images),
                (config.test_split, config.test_images),
            )
        ]
        classes = sorted({label for image in images[0] for label in image.labels})
        return _from_defects(images, classes, config.image_seed)
    read = read_llava if config.source == "llava" else read_messages
    train, test = (list(read(Path(split), root)) for split in (config.train_split, config.test_split))
    return Source(train[: config.train_images], test[: config.test_images])


def steel_part(config: DataConfig, stream: int, count: int | None) -> list[DefectImage]:
    """`count` rendered pictures of one stream of `config.image_seed`."""
    if count is None:
        raise ValueError("data.source is steel: give data.train_images and data.test_images, there is no natural end")
    return render_steel(count, seed=10 * config.image_seed + stream)


def _from_defects(parts: Sequence[list[DefectImage]], classes: Sequence[str], seed: int) -> Source:
    train, test = parts
    # Several turns an image share one pass of the vision tower. Judging asks each question alone.
    turns = join_turns(to_conversations(train, classes, seed), shuffle_seed=seed)
    return Source(turns, list(to_conversations(test, classes, seed)))
