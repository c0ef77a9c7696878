"""A bench small enough for seconds, and a few samples of the world."""

from __future__ import annotations

import pytest


@pytest.fixture
def bench(tmp_path):
    from tiny_size import TINY

    from eval.ten_skills.bench import Bench

    return Bench(TINY, tmp_path / "work")


@pytest.fixture(scope="module")
def samples():
    from eval.ten_skills.fast_step import draw

    return draw("train", 44, 5, 48)
