"""Whether a batch is one that a method can read. By shapes alone: no value is read, so that no GPU is waited for."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel


def check_batch(
    student: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    labels: Tensor | None,
) -> None:
    """ValueError unless input_ids, attention_mask and labels are [batch, time] and pixel_values are pictures as the
    student's vision tower reads them. How many image tokens belong to them is its pathway's `decode` to say."""
    shape = tuple(input_ids.shape)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids is {shape}: it must be [batch, time]; a single sample is a batch of one")
    if labels is None:
        raise ValueError(
            f"labels is None for input_ids {shape}, and every loss is over the answers: give [batch, time] with -100 "
            "off the answers (switchkd.data.Collator does)"
        )
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} and input_ids {shape}: they must be of one shape")
    if pixel_values is None:
        return
    vision = student.config.vision_config
    reads = (vision.num_channels, vision.image_size, vision.image_size)
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != reads:
        raise ValueError(
            f"pixel_values is {tuple(pixel_values.shape)} and the student's vision tower reads [images, "
            f"{', '.join(map(str, reads))}]: make them with the student's own image processor, all pictures of the "
            "batch one after the other"
        )
