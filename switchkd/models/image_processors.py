"""How a model sees a picture: the settings of its image processor, taken from a folder or made for a tower."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaImageProcessorPil, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from switchkd.models.towers import TOWERS

SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
# What an image processor does to a picture, and the settings of each step.
IMAGE_STEPS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_pad": (),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}


def load_image_processor(path: str | Path, field: str, *, local_files_only: bool = False) -> BaseImageProcessor:
    """The image processor saved in a folder or under a Hub name, as its PIL class; `field` names what gave the path.

    Raises ValueError where there is none, or one of another kind than a vision tower's of `TOWERS` or LLaVA's.
    """
    # What is saved names the plain class.
    classes = {tower.image_processor for tower in TOWERS.values()} | {LlavaImageProcessorPil}
    known = {each.__name__.removesuffix("Pil"): each for each in classes}
    way_out = f"give student.image_processor, a folder or Hub name with the settings of a {' or '.join(sorted(known))}"
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(path, local_files_only=local_files_only)
    except OSError as error:
        raise ValueError(f"{field} {path} has no {SETTINGS_FILES[0]} that can be read: {way_out}") from error
    name = str(settings.get("image_processor_type", settings.get("feature_extractor_type")))
    kind = name.removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if kind not in known:
        raise ValueError(f"{field} {path} has an image processor of type {name!r}: {way_out}")
    return known[kind].from_pretrained(path, local_files_only=local_files_only)


def tower_image_processor(path: str | Path, *, local_files_only: bool = False) -> BaseImageProcessor | None:
    """The image processor saved beside a vision tower; None for a folder that holds none.

    Raises as `load_image_processor`.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / file).is_file() for file in SETTINGS_FILES):
        return None
    return load_image_processor(path, "student.vision_tower", local_files_only=local_files_only)


def check_picture_size(image_processor: BaseImageProcessor, vision: PreTrainedConfig) -> None:
    """ValueError where the pictures are not the squares that the vision tower reads."""
    settings = image_settings(image_processor)
    step = "crop_size" if "crop_size" in settings else "size"
    size = settings.get(step, {})
    if (size.get("height"), size.get("width")) != (vision.image_size, vision.image_size):
        raise ValueError(
            f"the image processor's {step} is {size or 'not set'} and the vision tower reads {vision.image_size} x "
            f"{vision.image_size} px: give student.image_processor settings of that size, or a tower of the other"
        )


def image_settings(image_processor) -> dict:
    """What an image processor does, step by step, as plain values, which compare across backends; the settings of a
    step that is not done are left out."""
    values = {}
    for step, settings in IMAGE_STEPS.items():
        values[step] = bool(getattr(image_processor, step, None))
        for name in settings if values[step] else ():
            value = getattr(image_processor, name)
            if name.endswith("size"):
                value = {side: length for side, length in dict(value).items() if length is not None}
            values[name] = list(value) if name.startswith("image_") else value
    return values
