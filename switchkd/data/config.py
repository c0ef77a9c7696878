"""What a run trains on and is judged on: the `data` section of its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from switchkd.config import filled_in, refuse_unread


@dataclass(frozen=True)
class MixtureConfig:
    """One more set in a mixture of training data."""

    source: Literal["voc", "llava", "messages"]
    """A folder of Pascal VOC boxes, LLaVA JSON, or messages (JSON lines or parquet)."""
    root: str = field(metadata={"path": "always"})
    """Folder of the data set (voc) or of the images (llava, messages); $VARIABLES in it are filled in."""
    split: str = field(metadata={"path": "where it is there"})
    """Name of the split (voc), or the file of conversations (llava, messages)."""
    weight: float = 1.0
    """How often each conversation is seen in one epoch: 0.5 takes a random half of them, 2 takes each twice."""

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"data.mixture: the weight of {self.split} is {self.weight}, it must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """What is trained and judged on."""

    source: Literal["steel", "voc", "llava", "messages"] = "steel"
    """Rendered steel strip, a folder of Pascal VOC boxes, LLaVA JSON, or messages (JSON lines or parquet)."""
    root: str | None = field(default=None, metadata={"path": "always"})
    """Folder of the data set (voc) or of the images (llava, messages); $VARIABLES in it are filled in."""
    train_split: str = field(default="train", metadata={"path": "where it is there"})
    """Training part: name of the split (voc), or the file of conversations (llava, messages; $VARIABLES in it are
    filled in)."""
    test_split: str | None = field(default="test", metadata={"path": "where it is there"})
    """Test part, named in the same way; null: none, and nothing is judged."""
    mixture: tuple[MixtureConfig, ...] = ()
    """Further training parts, each with source, root, split and weight."""
    train_images: int | None = None
    """Images to train on; left out, all there are."""
    test_images: int | None = None
    """Images to judge on; left out, all there are."""
    kinds: tuple[str, ...] = ("exists", "classify", "count", "locate")
    """Kinds of question asked about images with boxes (steel, voc), each once an image."""
    image_seed: int = 0
    """Seed of the rendered images, of which images are picked, and of the questions."""
    max_length: int | None = None
    """Longest sample in tokens; a sample whose image tokens or whole answer would be cut is refused."""
    in_memory: bool = False
    """Encode all training samples once and keep them in memory: for small sets, 0.1 to 2 MB a picture."""

    max_bad_rate: float = 0.0
    """Share of bad samples or images that is skipped with a warning; above it the run stops before training."""
    first_pixel: int = 1
    """1: Pascal VOC, pixels 1 to width. 0: boxes written as edges, 0 to width."""

    def __post_init__(self):
        for name in ("train_images", "test_images"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"data.{name} is {count}, it must be 1 or more; left out, all there are")
        if not 0 <= self.max_bad_rate < 1:
            raise ValueError(f"data.max_bad_rate is {self.max_bad_rate}, it must be 0 or more and below 1")
        if self.first_pixel not in (0, 1):
            raise ValueError(f"data.first_pixel is {self.first_pixel}, it must be 0 or 1")
        sources = {self.source, *(each.source for each in self.mixture)}
        if self.source == "steel":
            why = "data.source is steel, which is rendered: set data.source to voc, llava or messages"
            refuse_unread("data", self, ("root", "train_split"), why)
            if self.test_split is not None:
                refuse_unread("data", self, ("test_split",), why)
        if "voc" not in sources:
            why = f"data.source is {self.source}, whose boxes are no files of Pascal VOC: set data.source to voc"
            refuse_unread("data", self, ("first_pixel",), why)
        if not sources & {"voc", "steel"}:
            why = f"data.source is {self.source}, which brings its own questions: set data.source to voc or steel"
            refuse_unread("data", self, ("kinds",), why)

    def folder(self) -> Path:
        """`root` with its variables filled in; ValueError when it is not given or names an unset variable,
        FileNotFoundError when it is no folder."""
        if not self.root:
            raise ValueError(f"data.source is {self.source}: give data.root, the folder of the data")
        root = filled_in(self.root, "data.root")
        if not root.is_dir():
            raise FileNotFoundError(f"data.root is {root}, which is not a folder: give --data.root")
        return root
