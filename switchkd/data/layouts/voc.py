"""Pascal VOC: annotations/*.xml beside images/, or Annotations/ and JPEGImages/."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from switchkd.data.bad_samples import keep_good
from switchkd.data.defects import Box, DefectImage
from switchkd.data.images import inside
from switchkd.data.layouts.files import first_folder, natural, pictures_by_stem, split_stems, upright_size

logger = logging.getLogger(__name__)

ANNOTATION_FOLDERS = ("annotations", "Annotations")
IMAGE_FOLDERS = ("images", "JPEGImages")
ANGLES = ("rotation", "angle", "theta", "orientation")
FORMS = ("robndbox", "polygon", "polyline", "points", "point", "ellipse", "mask", "segmentation", "cuboid")
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
LOOKED_FOR = f"Pascal VOC: {' or '.join(ANNOTATION_FOLDERS)} beside {' or '.join(IMAGE_FOLDERS)}"


def is_there(path: Path) -> bool:
    """Whether the folder holds labels of this layout."""
    return _folders(path) is not None


def read(path: Path, *, split: str | None, max_bad_rate: float, first_pixel: int) -> list[DefectImage]:
    """The images of a folder that `is_there` knows, as `read_defects` gives them."""
    annotations, pictures = _folders(path)
    files = pictures_by_stem(pictures)
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
        stems = split_stems(path, split)

    dropped: list[str] = []

    def read_one(stem: str) -> DefectImage:
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
        image, repeated = _image(labelled[stem], picture, first_pixel)
        dropped.extend([stem] * repeated)
        return image

    images = keep_good(sorted(stems, key=natural), read_one, max_bad_rate=max_bad_rate, what=str(path))
    if dropped:
        names = ", ".join(dict.fromkeys(dropped))
        logger.warning("%s: dropped %d boxes that repeat another exactly, in %s", path, len(dropped), names)
    return images


def _image(xml: Path, picture: Path, first_pixel: int) -> tuple[DefectImage, int]:
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
    actual = upright_size(picture)
    if stated != actual:
        raise ValueError(
            f"{xml}: field size says {stated[0]}x{stated[1]} but {picture} is {actual[0]}x{actual[1]}:"
            " the boxes may belong to another picture; use the one that was labelled or correct the size"
        )
    found = [_box(item, actual, xml, first_pixel) for item in root.findall("object")]
    kept = list(dict.fromkeys(found))
    boxes, labels = tuple(box for box, _ in kept), tuple(label for _, label in kept)
    return DefectImage(picture, *actual, boxes, labels, id=xml.stem), len(found) - len(kept)


def _box(item: ElementTree.Element, size: tuple[int, int], xml: Path, first_pixel: int) -> tuple[Box, str]:
    """The half-open box and the label of one object. Its errors show the numbers of the file."""
    label = _field(item, "name", xml)
    _refuse_more_than_a_box(item, f"{xml}: object {label!r}")
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


def _refuse_more_than_a_box(item: ElementTree.Element, where: str) -> None:
    """ValueError for an object whose label says more than one upright box, which would be taken for all of it: an angle
    (CVAT's attribute `rotation`, roLabelImg's `robndbox`), a form without a box, several boxes. A turn by half a
    circle leaves a box as it is, and a form beside its box, which encloses it, is fine."""
    for name, angle in _angles(item):
        if angle % 180 != 0:
            raise ValueError(
                f"{where} is turned: its {name} is {angle:g}, and its box would be read as upright;"
                " draw an upright box around it"
            )
    boxes = len(item.findall("bndbox"))
    form = next((form for form in FORMS if item.find(form) is not None), None)
    if form and not boxes:
        raise ValueError(f"{where} has a {form} and no bndbox, which alone is read: export its upright box")
    if boxes > 1:
        raise ValueError(f"{where} has {boxes} boxes (bndbox): give each an object of its own")


def _angles(item: ElementTree.Element) -> Iterator[tuple[str, float]]:
    """Name and value of everything in an object that is called an angle and is a number: elements, attributes of
    theirs, and CVAT's <attribute> of a name and a value. Words, as in an `orientation` of one's own, are none."""
    for element in item.iter():
        stated = {element.tag: element.text, **element.attrib}
        if element.tag == "attribute":
            stated[element.findtext("name", "")] = element.findtext("value")
        for name, text in stated.items():
            number = NUMBER.match((text or "").replace(",", "."))
            if name.strip().lower() in ANGLES and number:
                yield name.strip(), float(number[0])


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


def _folders(path: Path) -> tuple[Path, Path] | None:
    annotations, pictures = first_folder(path, ANNOTATION_FOLDERS), first_folder(path, IMAGE_FOLDERS)
    return (annotations, pictures) if annotations and pictures else None
