"""An image with labelled defects: what every layout of labels is read into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class DefectImage:
    """One image with the boxes of its defects.

    `boxes` are half-open pixel boxes (x1, y1, x2, y2), 0-based, with one label each. The picture is the file
    `image_path` or, for a rendered one, `image` itself. `id` defaults to the file's stem.
    Raises ValueError for a box that is empty, inverted or not inside the image.
    """

    image_path: Path | None
    width: int
    height: int
    boxes: tuple[Box, ...]
    labels: tuple[str, ...]
    image: Image.Image | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if self.image_path is None and (self.image is None or not self.id):
            raise ValueError(f"defect image {self.id!r}: give image_path, or a rendered image together with an id")
        if not self.id:
            object.__setattr__(self, "id", Path(self.image_path).stem)
        if len(self.boxes) != len(self.labels):
            raise ValueError(f"{self.id}: {len(self.boxes)} boxes and {len(self.labels)} labels; one label a box")
        for box, label in zip(self.boxes, self.labels, strict=True):
            self._check_box(box, label)

    def _check_box(self, box: Box, label: str) -> None:
        x1, y1, x2, y2 = box
        where = f"{self.id}: box {list(box)} of {label!r}"
        if not (x1 < x2 and y1 < y2):  # also catches nan
            raise ValueError(f"{where} is empty or inverted: it must have x1 < x2 and y1 < y2")
        if x1 < 0 or y1 < 0 or x2 > self.width or y2 > self.height:
            raise ValueError(
                f"{where} is not inside its {self.width}x{self.height} image:"
                " correct the box, or the size if the image was resized after labelling"
            )
