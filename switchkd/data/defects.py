"""Images with labelled defects: their boxes, and the reader of Pascal VOC folders."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from switchkd.data.bad_samples import keep_good
from switchkd.data.images import check_image, inside, orientation

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]

ANNOTATION_FOLDERS = ("annotations", "Annotations")
IMAGE_FOLDERS = ("images", "JPEGImages")
SPLIT_FOLDERS = ("splits", "ImageSets/Main")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LAYOUTS = ("auto", "voc")


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


def read_defects(
    path: str | Path,
    layout: str = "auto",
    split: str | None = None,
    *,
    max_bad_rate: float = 0.0,
    first_pixel: int = 1,
) -> Iterator[DefectImage]:
    """The labelled images below `path`, in natural order of their names (a_2 before a_10).

    layout: "voc", annotations/*.xml beside images/ (or Annotations/ and JPEGImages/); "auto" finds it out.
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
    1, an empty or inverted box, and a box outside its image.
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel={first_pixel} must be 1, as in Pascal VOC, or 0")
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; known layouts are {', '.join(LAYOUTS)}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; name the one that holds annotations/ and images/")
    annotations, pictures = _folder(path, ANNOTATION_FOLDERS), _folder(path, IMAGE_FOLDERS)
    if annotations is None or pictures is None:
        raise ValueError(
            f"{path}: no known layout of labels. Looked for Pascal VOC:"
            f" {' or '.join(ANNOTATION_FOLDERS)} beside {' or '.join(IMAGE_FOLDERS)}"
        )
    return iter(_read_voc(path, annotations, pictures, split, max_bad_rate, first_pixel))


def _read_voc(
    path: Path, annotations: Path, pictures: Path, split: str | None, max_bad_rate: float, first_pixel: int
) -> list[DefectImage]:
    files: dict[str, list[Path]] = {}
    for file in sorted(pictures.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(file.stem, []).append(file)
    labelled = {file.stem: file for file in annotations.glob("*.xml")}
    if not files or not labelled:
        raise ValueError(
            f"{path}: no images found: {len(files)} pictures in {pictures.name}/, {len(labelled)} XML files"
            f" in {annotations.name}/; an image needs both, with the same stem"
        )
    if split is None:
        stems = list(labelled)
        if unlabelled := len(files.keys() - labelled.keys()):
            logger.warning("%s: %d pictures without an XML file are left out", path, unlabelled)
    else:
        stems = _split_stems(path, split)

    dropped: list[str] = []

    def read(stem: str) -> DefectImage:
        if stem not in labelled:
            raise FileNotFoundError(f"{annotations / stem}.xml: no such file; split {split!r} lists {stem!r}")
        if stem not in files:
            raise FileNotFoundError(f"{labelled[stem]}: its image {stem}.* is missing in {pictures}")
        if len(files[stem]) > 1:
            names = " and ".join(file.name for file in files[stem])
            raise ValueError(
                f"{labelled[stem]}: both {names} in {pictures} have its stem; keep the one that was labelled"
            )
        picture = inside(path, files[stem][0].relative_to(path))
        image, repeated = _read_voc_image(labelled[stem], picture, first_pixel)
        dropped.extend([stem] * repeated)
        return image

    images = keep_good(sorted(stems, key=_natural), read, max_bad_rate=max_bad_rate, what=str(path))
    if dropped:
        names = ", ".join(dict.fromkeys(dropped))
        logger.warning("%s: dropped %d boxes that repeat another exactly, in %s", path, len(dropped), names)
    return images


def _read_voc_image(xml: Path, picture: Path, first_pixel: int) -> tuple[DefectImage, int]:
    """The image of one VOC file, and how many exactly repeated boxes were dropped."""
    try:
        root = ElementTree.fromstring(xml.read_bytes(), ElementTree.XMLParser(target=_PlainXML()))
    except OSError as error:
        raise ValueError(f"{xml}: cannot be read ({error})") from error
    except (ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"{xml}: is not well-formed XML ({error})") from error
    except ValueError as error:
        raise ValueError(f"{xml}: {error}") from error

    stated = _number(root, "size/width", xml), _number(root, "size/height", xml)
    actual = check_image(picture)
    if (turned := orientation(picture)) != 1:
        raise ValueError(
            f"{picture}: has EXIF orientation {turned}, so that its boxes may belong to the picture as stored or as"
            " shown; save the one that was labelled without the tag"
        )
    if stated != actual:
        raise ValueError(
            f"{xml}: field size says {stated[0]}x{stated[1]} but {picture} is {actual[0]}x{actual[1]}:"
            " the boxes may belong to another picture; use the one that was labelled or correct the size"
        )
    found = [_voc_box(item, actual, xml, first_pixel) for item in root.findall("object")]
    kept = list(dict.fromkeys(found))
    boxes, labels = tuple(box for box, _ in kept), tuple(label for _, label in kept)
    return DefectImage(picture, *actual, boxes, labels, id=xml.stem), len(found) - len(kept)


def _voc_box(item: ElementTree.Element, size: tuple[int, int], xml: Path, first_pixel: int) -> tuple[Box, str]:
    """The half-open box and the label of one object. Its errors show the numbers of the file."""
    label = _field(item, "name", xml)
    stated = {side: _number(item, f"bndbox/{side}", xml) for side in ("xmin", "ymin", "xmax", "ymax")}
    xmin, ymin, xmax, ymax = stated.values()
    box = (xmin - first_pixel, ymin - first_pixel, xmax, ymax)
    where = f"{xml}: box {', '.join(f'{side} {number}' for side, number in stated.items())} of {label!r}"
    if not (box[0] < xmax and box[1] < ymax):  # also catches nan
        raise ValueError(f"{where} is empty or inverted: correct or remove it")
    if min(box) < 0:
        way_out = "; where a tool counts from 0, give first_pixel=0" if first_pixel and min(box) >= -1 else ""
        raise ValueError(f"{where} begins before pixel {first_pixel}, where its image does: correct the box{way_out}")
    if xmax > size[0] or ymax > size[1]:
        raise ValueError(
            f"{where} is not inside its {size[0]}x{size[1]} image:"
            " correct the box, or the size if the image was resized after labelling"
        )
    return box, label


class _PlainXML(ElementTree.TreeBuilder):
    """Builds the tree but refuses a DOCTYPE, and with it every entity: labels need none, attacks do."""

    def doctype(self, name: str, pubid: str, system: str) -> None:
        raise ValueError("XML with a DOCTYPE or entities is refused; remove the declaration")


def _field(element: ElementTree.Element, field: str, xml: Path) -> str:
    text = (element.findtext(field) or "").strip()
    if not text:
        raise ValueError(f"{xml}: field {element.tag}/{field} is missing or empty")
    return text


def _number(element: ElementTree.Element, field: str, xml: Path) -> float:
    text = _field(element, field, xml)
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{xml}: field {element.tag}/{field} is {text!r}, not a number") from None
    return int(value) if value.is_integer() else value


def _split_stems(path: Path, split: str) -> list[str]:
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


def _natural(stem: str) -> tuple:
    # Splitting at digits alternates text and digits, so that text never meets a number in a comparison.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)], stem


def _folder(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)
