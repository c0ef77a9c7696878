"""Pictures on disk: paths that stay inside their data root, decoding, cheap checks before training."""

from __future__ import annotations

import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

TAIL_BYTES = 64
# What PIL raises for a file that is broken in one way or another, or that the system does not let it read.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits a channel
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, and the others are brought upright so:
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class StoredImage(Protocol):
    """A picture that is no file of its own, such as one in a parquet row; its text names it."""

    def open(self, mode: str = "rb") -> BinaryIO: ...


def inside(root: str | Path, name: str | Path) -> Path:
    """The path of `name` below `root`, symlinks resolved. Raises ValueError when it leads out of `root`.

    A folder is resolved once in a process: large sets name few folders and many files.
    """
    top = _resolved(os.fspath(root))
    folder, file = os.path.split(os.path.join(top, name))
    path = os.path.join(_resolved(folder), file)
    if file in ("", ".", "..") or os.path.islink(path):
        path = os.path.realpath(path)
    if not Path(path).is_relative_to(top):
        raise ValueError(
            f"image path {str(name)!r} leads to {path}, outside its data root {top}:"
            " move the image below the root or name a root that holds it"
        )
    return Path(path)


@lru_cache(maxsize=10_000)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def load_image(image: str | Path | StoredImage | Image.Image) -> Image.Image:
    """The picture in RGB, decoded and turned upright by its EXIF orientation: as people saw it when they wrote about
    it, and as `transformers.image_utils.load_image` gives it.

    Raises FileNotFoundError for a missing file, ValueError for one that cannot be decoded (truncated, not an
    image) or has more than 8 bits a channel, which a plain conversion would clip to white.
    """
    if not isinstance(image, Image.Image):
        with _open(image) as opened:
            return _decode(opened, image)
    return _decode(image, image)


def check_image(path: str | Path | StoredImage) -> tuple[int, int]:
    """(width, height) of an image file that can be decoded.

    A JPEG that ends with its end mark is taken for whole (0.05 ms), a PNG whose checksums are right (0.2 ms for 700
    kB); any other file is decoded. Raises as `load_image`.
    """
    with _open(path) as opened:
        _refuse_deep(opened, path)
        size = opened.size
        if opened.format == "PNG":
            try:
                opened.verify()
            except BROKEN as error:
                raise _broken(path, error) from error
        elif opened.format != "JPEG" or not _ends_whole(path):
            _decode(opened, path)
        return size


def orientation(path: str | Path) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1, upright, where it states none. Raises as `load_image`."""
    with _open(path) as opened:
        return _orientation(opened)


def _open(image: str | Path | StoredImage) -> Image.Image:
    try:
        if not isinstance(image, str | Path):
            return Image.open(image.open("rb"))
        path = Path(image)
        if path.is_file():
            return Image.open(path)
    except BROKEN as error:
        raise ValueError(f"{image}: cannot be read as an image ({error}); replace or remove it") from error
    # OCR-VQA's covers come partly as .gif, while LLaVA's files call all of them .jpg (LLaVA issues 593 and 601).
    other = next((each for each in map(path.with_suffix, SUFFIXES) if each.is_file()), None)
    way_out = f"rename {other.name}, which is there" if other else "correct the path or the data root"
    raise FileNotFoundError(f"{path}: no such image file; {way_out}")


def _decode(image: Image.Image, name: object) -> Image.Image:
    _refuse_deep(image, name)
    try:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        image = image.convert("RGB")
    except BROKEN as error:
        raise _broken(name, error) from error
    if turn is not None:
        image = image.transpose(turn)
        image.info.clear()  # the tag with it, so that nobody turns the picture again
    return image


def _orientation(image: Image.Image) -> int:
    try:
        # Of the base class: a PNG's own method decodes the whole picture in search of a tag after the pixels.
        found = Image.Image.getexif(image).get(ORIENTATION)
    except BROKEN:  # a broken tag does not spoil the picture
        return 1
    return found if found in UPRIGHT else 1


def _broken(name: object, error: Exception) -> ValueError:
    return ValueError(f"{name}: cannot be decoded ({error}); replace or remove it")


def _refuse_deep(image: Image.Image, name: object) -> None:
    if image.mode in DEEP_MODES:
        raise ValueError(f"{name}: has more than 8 bits a channel (mode {image.mode!r}); convert it to 8 bits first")


def _ends_whole(image: str | Path | StoredImage) -> bool:
    """Whether a JPEG ends with its end mark."""
    with (Path(image) if isinstance(image, str) else image).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - TAIL_BYTES, 0))
        return file.read().rstrip(b"\0\n\r").endswith(b"\xff\xd9")
