import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from switchkd.data import read_defects

XML = """<annotation><filename>{stem}</filename><size><width>{width}</width><height>{height}</height></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>
<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def write(root, stem, *boxes, size=(20, 10), folders=("annotations", "images"), suffix=".jpg", **fields):
    """One picture of 20x10 pixels and its VOC file."""
    for folder in folders:
        (root / folder).mkdir(exist_ok=True, parents=True)
    Image.effect_noise((20, 10), 50).save(root / folders[1] / (stem + suffix))
    objects = "".join(OBJECT.format(*box, name=fields.get("name", "crack")) for box in boxes)
    xml = root / folders[0] / f"{stem}.xml"
    xml.write_text(XML.format(stem=stem, width=size[0], height=size[1], objects=objects))
    return xml


def edit(xml, old, new):
    text = xml.read_text()
    assert old in text
    xml.write_text(text.replace(old, new))


def test_boxes_become_half_open_and_names_sort_naturally(tmp_path):
    write(tmp_path, "a_10", (1, 1, 20, 10))
    write(tmp_path, "a_9", (3, 2, 3, 2), name="rolled-in_scale")
    write(tmp_path, "a_2")
    two, nine, ten = read_defects(tmp_path)
    assert [two.id, nine.id, ten.id] == ["a_2", "a_9", "a_10"]
    assert (two.boxes, two.labels) == ((), ())
    assert (nine.boxes, nine.labels) == (((2, 1, 3, 2),), ("rolled-in_scale",))  # one pixel
    assert (ten.boxes, ten.width, ten.height) == (((0, 0, 20, 10),), 20, 10)
    assert ten.image_path == (tmp_path / "images" / "a_10.jpg").resolve()


def test_folders_and_splits_of_the_original_voc(tmp_path):
    for stem in ("x", "y", "z"):
        write(tmp_path, stem, (1, 1, 5, 5), folders=("Annotations", "JPEGImages"), suffix=".png")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("z\n\nx\n")
    assert [image.id for image in read_defects(tmp_path, "voc", split="val")] == ["x", "z"]


def test_repeated_boxes_are_dropped_in_one_log_line(tmp_path, caplog):
    write(tmp_path, "a", (1, 1, 5, 5), (1, 1, 5, 5), (1, 1, 5, 6), (1, 1, 5, 5))
    write(tmp_path, "b", (1, 1, 5, 5), (1, 1, 5, 5))
    images = list(read_defects(tmp_path))
    assert [image.boxes for image in images] == [((0, 0, 5, 5), (0, 0, 5, 6)), ((0, 0, 5, 5),)]
    assert len(caplog.records) == 1
    assert "dropped 3 boxes that repeat another exactly, in a, b" in caplog.text


def test_pictures_without_labels_are_reported(tmp_path, caplog):
    write(tmp_path, "a", (1, 1, 5, 5))
    write(tmp_path, "b").unlink()
    assert [image.id for image in read_defects(tmp_path)] == ["a"]
    assert "1 pictures without an XML file" in caplog.text


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 5, 4, 8), "empty or inverted"),
        ((5, 5, 9, 2), "empty or inverted"),
        (("nan", 5, 9, 9), "empty or inverted"),
        ((0, 1, 5, 5), "box xmin 0, ymin 1, xmax 5, ymax 5 of 'crack' begins before pixel 1.*give first_pixel=0"),
        ((1, -7, 5, 5), "ymin -7.* begins before pixel 1, where its image does: correct the box$"),
        ((1, 1, 21, 5), "box xmin 1, ymin 1, xmax 21, ymax 5 of 'crack' is not inside its 20x10 image"),
        ((1, 1, 5, 11), "not inside its 20x10 image"),
        ((1, 1, 5, "five"), "object/bndbox/ymax is 'five', not a number"),
        ((1, 1, 5, ""), "object/bndbox/ymax is missing or empty"),
    ],
)
def test_bad_boxes_name_the_file(tmp_path, box, message):
    xml = write(tmp_path, "a", box)
    with pytest.raises(ValueError, match=re.escape(str(xml)) + ".*" + message):
        read_defects(tmp_path)


def test_files_that_count_from_0(tmp_path):
    write(tmp_path, "a", (0, 0, 20, 10), (3, 2, 8, 9))
    (image,) = read_defects(tmp_path, first_pixel=0)
    assert image.boxes == ((0, 0, 20, 10), (3, 2, 8, 9))
    write(tmp_path, "a", (-1, 0, 5, 5))
    with pytest.raises(
        ValueError, match="box xmin -1, .* begins before pixel 0, where its image does: correct the box$"
    ):
        read_defects(tmp_path, first_pixel=0)
    with pytest.raises(ValueError, match="first_pixel=2 must be 1, as in Pascal VOC, or 0"):
        read_defects(tmp_path, first_pixel=2)


def test_two_pictures_for_one_file_are_refused(tmp_path, caplog):
    for number in range(4):
        write(tmp_path, f"a_{number}", (1, 1, 5, 5))
    write(tmp_path, "a_2", (1, 1, 5, 5), suffix=".png")
    with pytest.raises(
        ValueError, match=r"a_2\.xml: both a_2\.jpg and a_2\.png in .*images have its stem; keep the one"
    ):
        read_defects(tmp_path)
    assert [image.id for image in read_defects(tmp_path, max_bad_rate=0.25)] == ["a_0", "a_1", "a_3"]


def test_a_labelled_picture_that_a_viewer_turns_is_refused(tmp_path):
    write(tmp_path, "a", (1, 1, 5, 5))
    picture = tmp_path / "images/a.jpg"
    tags = Image.Exif()
    for stated in (1, 6):
        tags[0x0112] = stated
        Image.new("RGB", (20, 10)).save(picture, exif=tags)
        if stated == 1:
            assert len(list(read_defects(tmp_path))) == 1
    with pytest.raises(ValueError, match=r"a\.jpg: has EXIF orientation 6, .*save the one that was labelled without"):
        read_defects(tmp_path)


def test_an_unreadable_xml_is_named(tmp_path):
    xml = write(tmp_path, "a")
    xml.unlink()
    xml.mkdir()
    with pytest.raises(ValueError, match=r"a\.xml: cannot be read \("):
        read_defects(tmp_path)


def test_bad_xml_names_file_and_field(tmp_path):
    xml = write(tmp_path, "a", (1, 1, 5, 5))
    good = xml.read_text()

    def refused(message):
        with pytest.raises(ValueError, match=rf"a\.xml: .*{message}"):
            read_defects(tmp_path)
        xml.write_text(good)

    edit(xml, "</annotation>", "")
    refused("not well-formed XML")
    edit(xml, "<name>crack</name>", "")
    refused("field object/name is missing")
    edit(xml, "<height>10</height>", "")
    refused("field annotation/size/height is missing")
    edit(xml, "<width>20<", "<width>40<")
    refused(r"size says 40x10 but .*a\.jpg is 20x10")
    xml.write_text('<!DOCTYPE a [<!ENTITY b "crack">]>' + good.replace("crack", "&b;"))
    refused("DOCTYPE or entities is refused")


def test_bad_pictures(tmp_path):
    write(tmp_path, "a", (1, 1, 5, 5))
    picture = tmp_path / "images" / "a.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be decoded .*truncated"):
        read_defects(tmp_path)
    picture.write_text("not a picture")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as an image"):
        read_defects(tmp_path)
    picture.unlink()
    write(tmp_path, "b")
    with pytest.raises(FileNotFoundError, match=r"a\.xml: its image a\.\* is missing"):
        read_defects(tmp_path)


BOX = "<bndbox>"
CVAT = "<attributes><attribute><name>{}</name><value>{}</value></attribute></attributes>" + BOX
ROBNDBOX = "<robndbox><cx>5</cx><cy>5</cy><w>3</w><h>2</h><angle>{}</angle></robndbox>"


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (CVAT.format("rotation", "45.0"), "rotation is 45,"),
        (CVAT.format("Rotation", "-90.0"), "Rotation is -90,"),
        ("<angle>1.5708</angle>" + BOX, "angle is 1.5708,"),
        ("<rotation>12,5</rotation>" + BOX, "rotation is 12.5,"),
        ('<bndbox angle="30">', "angle is 30,"),
        (ROBNDBOX.format("0.7") + BOX, "angle is 0.7,"),
        ("<theta>90\u00b0</theta>" + BOX, "theta is 90,"),
    ],
    ids=["cvat", "quarter", "radians", "comma", "attribute", "robndbox", "degrees"],
)
def test_a_turned_object_is_a_bad_sample(tmp_path, caplog, label, found):
    write(tmp_path, "a", (1, 1, 5, 5))
    edit(write(tmp_path, "b", (1, 1, 5, 5)), BOX, label)
    with pytest.raises(ValueError, match=rf"b\.xml: object 'crack' is turned: its {re.escape(found)} and its box"):
        read_defects(tmp_path)
    assert [image.id for image in read_defects(tmp_path, max_bad_rate=0.5)] == ["a"]
    assert f"is turned: its {found}" in caplog.text


@pytest.mark.parametrize(
    "label",
    [
        CVAT.format("rotation", "0.0"),
        CVAT.format("rotation", "180.0"),
        CVAT.format("orientation", "along the strip"),
        CVAT.format("depth", "45"),
        "<pose>Left</pose><angle></angle>" + BOX,
        ROBNDBOX.format("0.0") + BOX,
        "<polygon><x1>1</x1><y1>1</y1></polygon>" + BOX,
    ],
    ids=["upright", "half a circle", "a word", "another number", "empty", "robndbox", "polygon"],
)
def test_what_leaves_the_box_as_it_is(tmp_path, label):
    edit(write(tmp_path, "a", (1, 1, 5, 5)), BOX, label)
    assert next(read_defects(tmp_path)).boxes == ((0, 0, 5, 5),)


@pytest.mark.parametrize("form", ["polygon", "robndbox", "mask"])
def test_an_object_without_a_box_names_what_it_has(tmp_path, form):
    xml = write(tmp_path, "a", (1, 1, 5, 5))
    xml.write_text(xml.read_text().replace("bndbox>", f"{form}>"))
    with pytest.raises(ValueError, match=rf"a\.xml: object 'crack' has a {form} and no bndbox, which alone is read"):
        read_defects(tmp_path)


def test_an_object_of_two_boxes_loses_neither(tmp_path):
    xml = write(tmp_path, "a", (1, 1, 5, 5), (2, 2, 6, 6))
    xml.write_text(re.sub(r"</object><object>.*?(?=<bndbox>)", "", xml.read_text(), flags=re.DOTALL))
    with pytest.raises(ValueError, match=r"a\.xml: object 'crack' has 2 boxes \(bndbox\): give each an object"):
        read_defects(tmp_path)


def test_pictures_stay_inside_the_folder(tmp_path):
    write(tmp_path / "elsewhere", "secret")
    write(tmp_path / "data", "a")
    (tmp_path / "data/images/a.jpg").unlink()
    (tmp_path / "data/images/a.jpg").symlink_to(tmp_path / "elsewhere/images/secret.jpg")
    with pytest.raises(ValueError, match="outside its data root"):
        read_defects(tmp_path / "data")


def test_bad_splits_and_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_defects(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no known layout of labels\. Looked for Pascal VOC: annotations"):
        read_defects(tmp_path)
    with pytest.raises(ValueError, match="layout='coco3d' is unknown; known layouts are auto, voc"):
        read_defects(tmp_path, "coco3d")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no images found: 0 pictures in images/, 0 XML files in annotations/"):
        read_defects(tmp_path)
    write(tmp_path, "a")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/train.txt").write_text("a\na\n")
    (tmp_path / "splits/val.txt").write_text("a\nghost\n")
    with pytest.raises(ValueError, match="unknown split 'test'; known splits are train, val"):
        read_defects(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"train\.txt: lists 'a' twice"):
        read_defects(tmp_path, split="train")
    with pytest.raises(FileNotFoundError, match=r"ghost\.xml: no such file; split 'val' lists 'ghost'"):
        read_defects(tmp_path, split="val")


def test_bad_images_are_skipped_up_to_the_stated_rate(tmp_path, caplog):
    for number in range(10):
        write(tmp_path, f"a_{number}", (1, 1, 5, 30 if number == 4 else 5))
    with pytest.raises(ValueError, match=r"a_4\.xml.*not inside"):
        read_defects(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 10 samples are bad \(10\.0%\), more than max_bad_rate=0\.05"):
        read_defects(tmp_path, max_bad_rate=0.05)
    assert len(list(read_defects(tmp_path, max_bad_rate=0.1))) == 9
    assert re.search(r"skipped 1 bad samples of 10: 0 missing .*\. First reasons: .*a_4\.xml", caplog.text)
    with pytest.raises(ValueError, match="max_bad_rate=3 must lie between 0 and 1"):
        read_defects(tmp_path, max_bad_rate=3)


@pytest.fixture(scope="module")
def neu_det():
    path = Path(os.environ.get("SWITCHKD_DATA", "")) / "neu-det"
    if not os.environ.get("SWITCHKD_DATA") or not path.is_dir():
        pytest.skip("NEU-DET not found: set SWITCHKD_DATA")
    return path


def test_neu_det(neu_det, caplog):
    caplog.set_level(logging.WARNING)
    images = list(read_defects(neu_det))
    assert len(images) == 1800
    # The XML holds 4,189 boxes; three repeat another exactly.
    assert sum(len(image.boxes) for image in images) == 4186
    assert "dropped 3 boxes that repeat another exactly, in crazing_120, inclusion_62, patches_198" in caplog.text
    assert [image.id for image in images[:3]] == ["crazing_1", "crazing_2", "crazing_3"]
    assert images[0].boxes == ((1, 1, 193, 194),)
    assert all(image.id.rsplit("_", 1)[0] in image.labels for image in images)


def test_neu_det_split(neu_det):
    train, val = (list(read_defects(neu_det, split=f"index240_{part}")) for part in ("train", "val"))
    assert (len(train), len(val)) == (1440, 360)
    assert not {image.id for image in train} & {image.id for image in val}
    assert sum(len(image.boxes) for image in val) == 854
    assert sum(len(image.boxes) for image in train) == 3332


def test_reading_boxes_brings_no_text_and_no_model():
    code = "import sys, switchkd.data.steel, switchkd.data.layouts.read; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name in ("torch", "transformers") or "conversations" in name]
