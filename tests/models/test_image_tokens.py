from __future__ import annotations

import pytest
import torch

from switchkd.models.image_tokens import images_per_sample, with_image_tokens

IMAGE = 9
# Two images apart, two images side by side, none; padding is id 0 with mask 0.
IDS = torch.tensor(
    [
        [1, 9, 9, 2, 9, 9, 3, 4],
        [9, 9, 9, 9, 5, 6, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
)
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 8])
LABELS = torch.full_like(IDS, -100)
LABELS[0, 6:], LABELS[1, 5], LABELS[2, 2:4] = torch.tensor([3, 4]), 6, torch.tensor([3, 4])


def test_more_tokens_an_image():
    ids, mask, labels = with_image_tokens(IDS, MASK, LABELS, IMAGE, given=2, wanted=3)
    assert ids.tolist() == [
        [1, 9, 9, 9, 2, 9, 9, 9, 3, 4],
        [9, 9, 9, 9, 9, 9, 5, 6, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
    ]
    assert mask.tolist() == [[1] * 10, [1] * 8 + [0] * 2, [1] * 8 + [0] * 2]
    no = -100
    assert labels.tolist() == [
        [no] * 8 + [3, 4],
        [no] * 7 + [6, no, no],
        [no, no, 3, 4] + [no] * 6,
    ]


def test_fewer_tokens_an_image():
    ids, mask, labels = with_image_tokens(IDS, MASK, LABELS, IMAGE, given=2, wanted=1)
    assert ids.tolist() == [
        [1, 9, 2, 9, 3, 4, 0, 0],
        [9, 9, 5, 6, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert mask.tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4, [1] * 8]
    assert labels[labels != -100].tolist() == LABELS[LABELS != -100].tolist()
    assert (ids[labels != -100] == labels[labels != -100]).all()


def test_there_and_back_is_the_same_again():
    there = with_image_tokens(IDS, None, LABELS, IMAGE, given=2, wanted=7)
    back = with_image_tokens(*there, IMAGE, given=7, wanted=2)
    assert there[0].shape == (3, 18)
    assert there[1].sum(1).tolist() == [18, 18, 8]  # without a mask all that was given is read, padding too
    for tensor, start in zip(back, (IDS, torch.ones_like(IDS), LABELS), strict=True):
        assert torch.equal(tensor[:, :8], start)


def test_padding_on_the_left_stays_there():
    ids, mask = torch.tensor([[0, 0, 9, 9, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
    ids, mask, labels = with_image_tokens(ids, mask, ids.new_full((1, 5), -100), IMAGE, given=2, wanted=1)
    assert (ids.tolist(), mask.tolist(), labels.tolist()) == ([[0, 0, 9, 5]], [[0, 0, 1, 1]], [[-100] * 4])


def test_images_of_each_sample():
    assert images_per_sample(IDS, IMAGE, 2).tolist() == [2, 2, 0]
    with pytest.raises(ValueError, match=r"hold \[4, 4, 0\] image tokens and an image takes 3"):
        images_per_sample(IDS, IMAGE, 3)
