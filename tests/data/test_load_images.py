"""Labelled pictures, before any text."""

from dataclasses import replace

import pytest
from voc_folder import write_voc

from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.data.sources import load_conversations, load_images
from switchkd.data.steel import CLASSES

STEEL = DataConfig(train_images=12, test_images=12)


def test_the_pictures_are_those_that_are_asked_about(tmp_path):
    voc = replace(write_voc(tmp_path, train=["b", "a", "c"] * 4, test=["a", "b"]), train_images=5, image_seed=3)
    for config in (STEEL, voc):
        pictures, talks = load_images(config), load_conversations(config)
        assert pictures.classes == (CLASSES if config is STEEL else ("a", "b", "c"))
        asked = [each.id.split("/")[0] for each in talks.train]
        assert [each.id for each in pictures.train] == asked
        assert list(dict.fromkeys(each.id.split("/")[0] for each in talks.test)) == [each.id for each in pictures.test]
        assert len(pictures.train) == (12 if config is STEEL else 5)
    assert load_images(replace(voc, test_split=None)).test == []


def test_further_pictures_by_their_weight_and_their_classes(tmp_path):
    main = write_voc(tmp_path / "main", train=["b", "a"], test=["a"])
    write_voc(tmp_path / "more", all=["rust", "a"] * 4)
    mixture = tuple(MixtureConfig("voc", str(tmp_path / "more"), "all", weight) for weight in (1.5, 0.25))
    pictures = load_images(replace(main, mixture=mixture))
    assert pictures.classes == ("a", "b", "rust")
    assert [each.id for each in pictures.train[:2]] == ["a_1", "b_1"]
    assert len(pictures.train) == 2 + 8 + 4 + 2
    assert len(pictures.test) == 1


def test_conversations_are_no_labelled_pictures(tmp_path):
    files = DataConfig(source="llava", root=str(tmp_path), train_split="train.json")
    with pytest.raises(ValueError, match=r"data\.source is llava, which has no labelled pictures: give voc or steel"):
        load_images(files)
    part = MixtureConfig("messages", str(tmp_path), "more.jsonl")
    with pytest.raises(ValueError, match=r"data\.mixture\[0\]\.source is messages, which has no labelled pictures"):
        load_images(replace(STEEL, mixture=(part,)))
