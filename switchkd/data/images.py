"""Pictures on disk: paths that stay inside their data root, decoding, cheap checks before training."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

TAIL_BYTES = 64
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits a channel


def inside(root: str | Path, name: str | Path) -> Path:
    """The path of `name` below `root`, symlinks resolved. Raises ValueError when it leads out of `root`."""
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(
            f"image path {str(name)!r} leads to {path}, outside its data root {root}:"
            " move the image below the root or name a root that holds it"
        )
    return path


def load_image(image: str | Path | Image.Image) -> Image.Image:
    """The picture in RGB, decoded.

    Raises FileNotFoundError for a missing file, ValueError for one that cannot be decoded (truncated, not an
    image) or has more than 8 bits a channel, which a plain conversion would clip to white.
    """
    if not isinstance(image, Image.Image):
        with _open(image) as opened:
            return _decode(opened, image)
    return _decode(image, image)


def check_image(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file that can be decoded, in about 0.1 ms for a whole JPEG or PNG.

    A JPEG or PNG that ends with its end mark is taken for whole; any other file is decoded.
    Raises as `load_image`.
    """
    with _open(path) as opened:
        _refuse_deep(opened, path)
        if not _ends_whole(path, opened.format):
            _decode(opened, path)
        return opened.size


def _open(path: str | Path) -> Image.Image:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file; correct the path or the data root")
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def _decode(image: Image.Image, name: object) -> Image.Image:
    _refuse_deep(image, name)
    try:
        image.load()
    # SyntaxError: what PIL raises for broken PNG chunks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    return image.convert("RGB")


def _refuse_deep(image: Image.Image, name: object) -> None:
    if image.mode in DEEP_MODES:
        raise ValueError(f"{name}: has more than 8 bits a channel (mode {image.mode!r}); convert it to 8 bits first")


def _ends_whole(path: str | Path, file_format: str | None) -> bool:
    with Path(path).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - TAIL_BYTES, 0))
        tail = file.read()
    if file_format == "JPEG":
        return tail.rstrip(b"\0\n\r").endswith(b"\xff\xd9")
    return file_format == "PNG" and b"IEND" in tail[-16:]
