"""The shipped configurations: listed, found by name, copied with what they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchkd.configs import copy, find, shipped, summary
from switchkd.tasks import load_config

ROOT = Path(__file__).parents[1]


def test_all_are_listed_each_with_a_sentence():
    assert shipped() == sorted((ROOT / "recipes/configs").glob("*.yaml"))
    for file in shipped():
        assert len(summary(file).split()) > 5, file


def test_a_name_is_a_file_or_a_shipped_one(tmp_path):
    assert find("quickstart") == find("quickstart.yaml") == ROOT / "recipes/configs/quickstart.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("name: a\n")
    assert find(own) == own
    with pytest.raises(FileNotFoundError, match=r"quick is neither a file nor .*: known are clip_7b, .*quickstart"):
        find("quick")


def test_a_copy_brings_what_makes_its_teacher_and_overwrites_nothing(tmp_path):
    made = copy(["tinyllava_3b_to_0.5b"], tmp_path)
    assert [file.name for file in made] == ["tinyllava_3b_to_0.5b.yaml", "tinyllava_3b.yaml"]
    run = load_config(["--config", str(made[0])])
    assert Path(run.teacher.made_by) == made[1]
    made[1].write_text("mine")
    with pytest.raises(FileExistsError, match=r"has .*tinyllava_3b.yaml already"):
        copy(["tinyllava_3b"], tmp_path)
    assert made[1].read_text() == "mine"
