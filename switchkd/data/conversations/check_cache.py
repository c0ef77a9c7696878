"""What the check of all samples found, kept on the disk for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from switchkd.data.bad_samples import Faults
from switchkd.data.conversations.conversation import Conversation

logger = logging.getLogger(__name__)

FORMAT = 3  # raise it when the check finds other things than before


@dataclass
class CheckOutcome:
    """Of every conversation in order its length and its answer tokens, 0 for a bad one; how many samples are cut;
    the faults of each source."""

    lengths: list[int]
    answer_lengths: list[int]
    cut: int
    faults: list[Faults]


def outcome_key(
    conversations: Sequence[Conversation], processor: Any, tokens_an_image: int, max_length: int | None
) -> str:
    """A hash of everything that the check depends on, of image files their paths alone.

    About 15 s for 665,000 conversations of ten messages.
    """
    tokenizer = processor.tokenizer
    # Padding and truncation are left behind by whoever called the tokenizer last, and the check uses neither.
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    settings = [FORMAT, transformers.__version__, rules, tokenizer.special_tokens_map, processor.chat_template]
    settings += [processor.image_token, tokens_an_image, max_length]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    for each in conversations:
        images = ["picture" if isinstance(image, Image.Image) else str(image) for image in each.images]
        digest.update(json.dumps([each.id, each.source, images, each.messages], default=repr).encode())
    return digest.hexdigest()


def load_outcome(folder: Path, key: str, count: int) -> CheckOutcome | None:
    """What `save_outcome` kept under `key` for `count` conversations; None, with a warning, for a file that is torn
    or of another kind."""
    path = _path(folder, key)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        faults = [Faults(**each) for each in kept["faults"]]
        outcome = CheckOutcome(kept["lengths"], kept["answer_lengths"], kept["cut"], faults)
        if kept["key"] == key and len(outcome.lengths) == len(outcome.answer_lengths) == count:
            return outcome
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    logger.warning("%s is torn or of another kind: the samples are checked again", path)
    return None


def save_outcome(folder: Path, key: str, outcome: CheckOutcome) -> None:
    """Keep `outcome` under `key`, whole or not at all; a disk that refuses it is a warning, not an error."""
    path = _path(folder, key)
    staged = path.with_suffix(f".{os.getpid()}.incomplete")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"key": key, **asdict(outcome)}), encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        logger.warning("%s: the check could not be kept (%s), the next start repeats it", path, error)
        with suppress(OSError):
            staged.unlink()


def _path(folder: Path, key: str) -> Path:
    return Path(folder) / f"samples-{key[:16]}.json"
