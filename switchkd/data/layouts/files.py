"""What the layouts share: pictures and their stems, splits, the order of names."""

from __future__ import annotations

import re
from pathlib import Path

from switchkd.data.images import check_image, orientation

SPLIT_FOLDERS = ("splits", "ImageSets/Main")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def first_folder(path: Path, names: tuple[str, ...]) -> Path | None:
    """The first folder below `path` of these names; None where it has none."""
    return next((path / name for name in names if (path / name).is_dir()), None)


def pictures_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Stem -> the pictures of a folder that have it: more than one where the labels could belong to either."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(file.stem, []).append(file)
    return files


def upright_size(picture: Path) -> tuple[int, int]:
    """(width, height) of a labelled picture. Raises as `check_image`, and ValueError for an EXIF orientation other
    than 1."""
    size = check_image(picture)
    if (turned := orientation(picture)) != 1:
        raise ValueError(
            f"{picture}: has EXIF orientation {turned}, so that its boxes may belong to the picture as stored or as"
            " shown; save the one that was labelled without the tag"
        )
    return size


def split_stems(path: Path, split: str) -> list[str]:
    """The stems that splits/<split>.txt or ImageSets/Main/<split>.txt below `path` lists, one a line. Raises
    ValueError for a split that is not there, is empty or lists a stem twice."""
    folders = [path / folder for folder in SPLIT_FOLDERS if (path / folder).is_dir()]
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.txt"))}
    if split not in known:
        raise ValueError(
            f"{path}: unknown split {split!r}; known splits are {', '.join(sorted(known)) or 'none'}"
            f" (files <split>.txt in {' or '.join(SPLIT_FOLDERS)})"
        )
    stems = [line.strip() for line in known[split].read_text(encoding="utf-8").splitlines() if line.strip()]
    twice = [stem for stem in dict.fromkeys(stems) if stems.count(stem) > 1] if len(set(stems)) < len(stems) else []
    if twice or not stems:
        raise ValueError(f"{known[split]}: " + (f"lists {twice[0]!r} twice" if twice else "lists no image"))
    return stems


def natural(stem: str) -> tuple:
    """Sorts a_2 before a_10."""
    # Splitting at digits alternates text and digits, so that text never meets a number in a comparison.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)], stem
