"""A folder of labelled images in whatever layout -> its images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from switchkd.data.defects import DefectImage
from switchkd.data.layouts import voc

# A layout is a module: LOOKED_FOR says by what its folder is known, is_there(path) whether it is one, and
# read(path, split=..., max_bad_rate=..., first_pixel=...) reads its images.
LAYOUTS = {"voc": voc}


def read_defects(
    path: str | Path,
    layout: str = "auto",
    split: str | None = None,
    *,
    max_bad_rate: float = 0.0,
    first_pixel: int = 1,
) -> Iterator[DefectImage]:
    """The labelled images below `path`, in natural order of their names (a_2 before a_10).

    layout: a name in LAYOUTS; "auto" finds it out.
    split: the name of splits/<split>.txt or ImageSets/Main/<split>.txt, one stem a line; None: all images.
    max_bad_rate: the share of bad images that may be skipped, with one warning; with 0 the first is an error.
    first_pixel: 1, Pascal VOC: pixels count from 1 and the last is included, so that a box becomes (xmin - 1,
        ymin - 1, xmax, ymax) and the whole image is 1 to width. 0, for tools that write the edges of a box
        instead: it is taken as it stands, and the whole image is 0 to width.

    Everything is read and checked before the first image is returned. Boxes marked difficult are kept. Boxes
    that repeat another of the same label exactly are dropped and counted in one log line.

    Raises FileNotFoundError for a missing folder or image, ValueError for an unknown layout or split and,
    naming file and field, for XML that does not parse or misses a field, a size that differs from the
    picture's, a picture that cannot be decoded, two pictures for one XML file, an EXIF orientation other than
    1, an object that is turned, has no box or several, an empty or inverted box, and a box outside its image.
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel={first_pixel} must be 1, as in Pascal VOC, or 0")
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout={layout!r} is unknown; known layouts are auto, {', '.join(LAYOUTS)}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; name the one that holds annotations/ and images/")
    asked = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
    found = next((each for each in asked.values() if each.is_there(path)), None)
    if found is None:
        looked_for = "; ".join(each.LOOKED_FOR for each in asked.values())
        raise ValueError(f"{path}: no known layout of labels. Looked for {looked_for}")
    return iter(found.read(path, split=split, max_bad_rate=max_bad_rate, first_pixel=first_pixel))
