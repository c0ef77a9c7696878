from pathlib import Path

import pytest

from switchkd.data import DefectImage


def test_defect_image_checks_itself():
    with pytest.raises(ValueError, match="give image_path, or a rendered image together with an id"):
        DefectImage(None, 5, 5, (), ())
    with pytest.raises(ValueError, match="p: 1 boxes and 0 labels"):
        DefectImage(Path("p.jpg"), 5, 5, ((0, 0, 1, 1),), ())
    with pytest.raises(ValueError, match=r"p: box \[1, 1, 1, 2\] of 'crack' is empty or inverted"):
        DefectImage(Path("p.jpg"), 5, 5, ((1, 1, 1, 2),), ("crack",))
