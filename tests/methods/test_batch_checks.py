"""Batches made by hand: what does not fit together is an error, in either method and whatever terms are on."""

from __future__ import annotations

import pytest
import torch

from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.methods.batch_checks import check_batch

IMAGE = 3
TERMS = {
    "all": {"feature": "cosine"},
    "align": {"switch": None},
    "switch": {"align": None},
    "feature": {"align": None, "switch": None, "feature": "relation"},
}


@pytest.fixture(params=["supervised", *TERMS])
def method(request, student, teacher):
    if request.param == "supervised":
        return SupervisedMethod(student)
    return SwitchKD(student, teacher, **TERMS[request.param])


def no_marks(batch):
    batch["input_ids"][batch["input_ids"] == IMAGE] = 5


def another_id(batch):
    batch["input_ids"][batch["input_ids"] == IMAGE] = 7


def no_pictures(batch):
    del batch["pixel_values"]


def no_pictures_of_one(batch):
    """As many image tokens as the blank picture would take."""
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:1]
    del batch["pixel_values"]


def one_picture_less(batch):
    batch["pixel_values"] = batch["pixel_values"][:1]


def one_picture_more(batch):
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 1]]


def cut_marks(batch):
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name][:, 3:]


def torn_between_samples(batch):
    """32 image tokens for two pictures, 24 of them in the second sample."""
    batch["input_ids"][0, :8] = 5
    batch["input_ids"][1, 16:24] = IMAGE


def other_pixels(*shape):
    return lambda batch: batch.update(pixel_values=torch.zeros(*shape))


def changed(name, change):
    return lambda batch: batch.update({name: change(batch[name])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_marks, r"hold 0 image tokens \(id 3\) but the 2 images give 32 visual tokens: encode"),
        (another_id, r"hold 0 image tokens \(id 3\) but the 2 images give 32 visual tokens"),
        (no_pictures, r"hold 32 image tokens \(id 3\) and there are no pixel_values: give the pictures"),
        (no_pictures_of_one, r"hold 16 image tokens \(id 3\) and there are no pixel_values"),
        (one_picture_less, "hold 32 image tokens .* but the 1 images give 16 visual tokens"),
        (one_picture_more, "hold 32 image tokens .* but the 3 images give 48 visual tokens"),
        (cut_marks, "hold 26 image tokens .* but the 2 images give 32 visual tokens"),
        (torn_between_samples, r"sample 0 of the batch holds 8 image tokens \(id 3\) and an image takes 16"),
        (other_pixels(2, 3, 64, 64), r"pixel_values is \(2, 3, 64, 64\) and .* reads \[images, 3, 32, 32\]: make them"),
        (other_pixels(2, 1, 32, 32), r"pixel_values is \(2, 1, 32, 32\) and"),
        (other_pixels(2, 1, 3, 32, 32), r"pixel_values is \(2, 1, 3, 32, 32\) and"),
        (other_pixels(3, 32, 32), r"pixel_values is \(3, 32, 32\) and"),
        (changed("labels", lambda labels: None), r"labels is None for input_ids \(2, \d+\), and every loss is over"),
        (changed("labels", lambda labels: labels[:, :-1]), r"labels is \(2, \d+\) and input_ids \(2, \d+\): they must"),
        (changed("labels", lambda labels: labels[0]), r"labels is \(\d+,\) and input_ids \(2, \d+\)"),
        (changed("attention_mask", lambda mask: mask[:1]), r"attention_mask is \(1, \d+\) and input_ids \(2, \d+\)"),
        (changed("input_ids", lambda ids: ids[0]), r"input_ids is \(\d+,\): it must be \[batch, time\]; a single"),
    ],
)
def test_what_does_not_fit_together(method, batch, change, said):
    method(**batch)
    change(batch)
    with pytest.raises(ValueError, match=said):
        method(**batch)


def test_text_alone_and_two_pictures_of_one_sample(method, batch):
    """What does fit: neither is refused."""
    text = {name: value[:, 16:] for name, value in batch.items() if name != "pixel_values"}
    assert method(**text).loss.isfinite()
    both = {name: torch.cat([value[:1, :16], value[:1]], 1) for name, value in batch.items() if name != "pixel_values"}
    assert method(**both, pixel_values=batch["pixel_values"]).loss.isfinite()


def test_the_shapes_are_checked_without_a_value(student, batch):
    """Meta tensors have none: on a GPU nothing would be waited for."""
    given = {name: tensor.to("meta") for name, tensor in batch.items()}
    check_batch(student, **given)
    given["labels"] = given["labels"][:, 1:]
    with pytest.raises(ValueError, match="labels is"):
        check_batch(student, **given)
