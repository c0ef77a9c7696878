import numpy as np
import pytest

from switchkd.data.steel import CLASSES, render_steel


def test_the_same_seed_gives_the_same_pictures_in_any_pieces():
    whole = render_steel(6, seed=5)
    pieces = render_steel(2, seed=5) + render_steel(4, seed=5, first=2)
    for a, b in zip(whole, pieces, strict=True):
        assert (a.id, a.boxes, a.labels) == (b.id, b.boxes, b.labels)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    other = render_steel(1, seed=6)[0]
    assert not np.array_equal(np.asarray(whole[0].image), np.asarray(other.image))


def test_boxes_hold_the_drawn_defect_and_nothing_is_drawn_outside(monkeypatch):
    """Without strip, shading and grain every pixel that differs from the ground lies in a box, and boxes are tight."""
    from switchkd.data import steel

    monkeypatch.setattr(steel, "_strip", lambda rng, size: np.full((size, size), 0.5))
    for image in render_steel(60, seed=1):
        grey = np.asarray(image.image)[:, :, 0].astype(int)
        changed = np.abs(grey - 128) > 32  # far above the grain, at most 0.025 of 255 one sigma
        inside = np.zeros_like(changed)
        for x1, y1, x2, y2 in np.array(image.boxes, dtype=int).reshape(-1, 4):
            inside[y1:y2, x1:x2] = True
            assert changed[y1:y2, x1:x2].any(), image.id
        assert not (changed & ~inside).any(), image.id


def test_all_kinds_counts_and_sizes_occur():
    images = render_steel(400, seed=0)
    labels = [label for image in images for label in image.labels]
    assert {label: labels.count(label) > 50 for label in CLASSES} == dict.fromkeys(CLASSES, True)
    counts = [len(image.boxes) for image in images]
    assert set(counts) == {0, 1, 2, 3}
    assert 0.05 < counts.count(0) / len(counts) < 0.2
    assert all(image.image.size == (96, 96) and len(set(image.labels)) <= 2 for image in images)


def test_boxes_do_not_touch():
    for image in render_steel(100, seed=3):
        for i, a in enumerate(image.boxes):
            for b in image.boxes[:i]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_bad_sizes():
    with pytest.raises(ValueError, match="count is 3 and size 8; give count >= 0 and size >= 32 pixels"):
        render_steel(3, seed=0, size=8)
