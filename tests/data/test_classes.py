"""One class name in two forms is refused, in one split, between splits, between the parts of a mixture."""

import re
from dataclasses import replace

import pytest
from voc_folder import write_voc

from switchkd.data import DefectImage, to_conversations
from switchkd.data.classes import refuse_alike
from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.data.sources import load_conversations, load_images

ALIKE = [
    ("Scratch", "scratch"),
    ("oil_spot", "oil spot"),
    ("oil-spot", "oil_spot"),
    ("oil  spot", "oil spot"),
    ("rust ", "rust"),
    ("Rost\u00f6l", "Rosto\u0308l"),  # one letter, and a letter with its dots apart
    ("\uff52\uff55\uff53\uff54", "rust"),  # full width
    ("STRASSE", "stra\u00dfe"),
]
BOTH = pytest.mark.parametrize("load", [load_images, load_conversations])


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_one_name_in_two_forms_is_refused(one, other, tmp_path):
    message = f"classes: class {other!r} differs from {one!r} only in its form"
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_alike([(one, "classes"), ("dent", "classes"), (other, "classes")])
    image = DefectImage(tmp_path / "a.png", 9, 9, ((0, 0, 3, 3),), (one,))
    with pytest.raises(ValueError, match=re.escape(message)):
        to_conversations([image], [one, other])


def test_other_names_are_other_classes():
    names = ["a1", "a 1", "a2", "scratch", "scratches", "rolled-in_scale", "rolled", "裂纹", "裂痕", "ö", "o"]
    refuse_alike([(name, "classes") for name in names])
    refuse_alike([("scratch", "train"), ("scratch", "test")])


@BOTH
@pytest.mark.parametrize(
    ("one", "other"), [("Scratch", "scratch"), ("oil_spot", "oil-spot"), ("R\u00f6st", "Ro\u0308st")]
)
def test_in_one_split(tmp_path, load, one, other):
    config = write_voc(tmp_path, train=[one, other], test=[one])
    first, second = sorted([one, other])
    message = f"data.train_split train: class {second!r} differs from {first!r} only in its form"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(config)


@BOTH
@pytest.mark.parametrize(("one", "other"), [("Scratch", "scratch"), ("oil_spot", "oil spot")])
def test_between_train_and_test(tmp_path, load, one, other):
    config = write_voc(tmp_path, train=[one, "dent"], test=["dent", other])
    message = f"data.test_split test: {other}_1: class {other!r} differs from {one!r} of data.train_split train only in"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(config)


@BOTH
@pytest.mark.parametrize("other", ["Scratches", "rolled-in scale", "Pitted Surface"])
def test_between_the_parts_of_a_mixture(tmp_path, load, other):
    write_voc(tmp_path / "more", all=[other])
    part = MixtureConfig("voc", str(tmp_path / "more"), "all")
    main = DataConfig(train_images=2, test_images=1, mixture=(part,))
    message = rf"data\.mixture\[0\] all: class {other!r} differs from '.*' of data\.source steel only in its form"
    with pytest.raises(ValueError, match=message):
        load(main)
    write_voc(tmp_path / "third", all=[other])
    parts = (MixtureConfig("voc", str(tmp_path / "third"), "all"), replace(part, root=str(tmp_path / "lower")))
    write_voc(tmp_path / "lower", all=[other.swapcase()])
    main = replace(write_voc(tmp_path / "main", train=["dent"], test=["dent"]), mixture=parts)
    with pytest.raises(ValueError, match=r"data\.mixture\[1\] all: class .* of data\.mixture\[0\] all only in"):
        load(main)
