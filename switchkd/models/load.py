"""What stands in a folder or under a Hub name, read whole or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from switchkd.models.templates import image_template

# SigLIP's pooling head: LLaVA reads the tower's hidden states, so that a file may be without it.
UNREAD = re.compile(r"(^|\.)head\.")
SHOWN = 3  # of the names of tensors


def named(path: str | Path, field: str | None = None) -> str:
    """The path, behind the field of the configuration that gives it where there is one."""
    return f"{field} {path}" if field else str(path)


@contextmanager
def reading(path: str | Path, what: str, field: str | None = None) -> Iterator[None]:
    """One line for whatever the libraries raise here while they read `path`, which `field` gives.

    what: "LLaVA model", "language model", .... Raises FileNotFoundError for what is neither a folder nor to be had from
    the Hub, OSError for a folder without a file, and ValueError for a file that cannot be read.
    """
    name = named(path, field)
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if Path(path).is_dir():
            again = f"give the folder of a saved {what}, or copy it again"
            raise OSError(f"{name}: {_first_line(error)}: {again}") from error
        hub = "the Hub is not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else _first_line(error)
        raise FileNotFoundError(
            f"{name} is no folder here, and not on this disk as a Hub name; {hub}: give the folder of a saved {what}, "
            f"or download it where the Hub can be reached (hf download {path})"
        ) from error
    except Exception as error:  # the readers of configurations, tokenizers and weights raise whatever they like
        raise ValueError(
            f"{name} cannot be read as a {what} ({type(error).__name__}: {_first_line(error)}): give the folder "
            "of another, or copy or download it again"
        ) from error


def check_folder(path: str | Path, what: str, field: str | None = None) -> None:
    """FileNotFoundError where `path` is a folder without config.json, or looks like a path and is not there."""
    folder, name = Path(path), named(path, field)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: give the folder of a saved {what}, or a Hub name")
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith(".")):
        raise FileNotFoundError(f"{name} does not exist: give the folder of a saved {what}, or a Hub name")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else "no reason given"


def load_weights(
    model_class: Any,
    path: str | Path,
    what: str,
    field: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    beside: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedModel:
    """`model_class.from_pretrained(path)` where the file's tensors are the model's, all of them and no others.

    what, field: as in `reading`. beside: how the names of tensors begin that may stand in the file and are not the
    model's. Safetensors only. A tied head absent from the file is no missing tensor, nor is SigLIP's pooling head,
    which nothing reads. Raises as `reading`, and ValueError for tensors that are missing, of another shape or nobody's.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of keys: what matters of it is the error here
    try:
        with reading(path, what, field):
            model, found = model_class.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told apart from other faults below
                output_loading_info=True,
                **options,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_tensors(found, named(path, field), what, beside)
    return model


def _check_tensors(found: Mapping[str, Any], name: str, what: str, beside: tuple[str, ...]) -> None:
    shapes = {key: (tuple(saved), tuple(own)) for key, saved, own in found["mismatched_keys"]}
    faults = [
        (found["missing_keys"], "of the model are missing from it"),
        ([f"{key} {saved}, in the model {own}" for key, (saved, own) in shapes.items()], "have another shape"),
        ([key for key in found["unexpected_keys"] if not key.startswith(beside)], "are not the model's"),
    ]
    said = []
    for keys, fault in faults:
        if keys := sorted(key for key in keys if not UNREAD.search(key)):
            more = ", ..." if len(keys) > SHOWN else ""
            said.append(f"{len(keys)} tensors {fault} ({', '.join(keys[:SHOWN])}{more})")
    if said:
        raise ValueError(
            f"{name} holds other weights than the {what} of its config.json has: {'; '.join(said)}: save or copy the "
            "model whole, or correct its config.json"
        )


def load_processor(
    path: str | Path, field: str | None = None, *, chat_template: str | None = None, local_files_only: bool = False
) -> LlavaProcessor:
    """The processor saved with a LLaVA model, with `chat_template` in place of its own where that is given.

    Raises as `reading`, and ValueError for a processor of another kind and where `chat_template` does not take images.
    """
    with reading(path, "processor", field):
        processor = AutoProcessor.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"{named(path, field)} has a processor of class {type(processor).__name__}, not LlavaProcessor: save the "
            "one that belongs to the model beside it (processor_config.json)"
        )
    if chat_template:
        processor.chat_template = processor.tokenizer.chat_template = image_template(processor.tokenizer, chat_template)
    return processor


def load_tokenizer(path: str, field: str | None = None, *, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model. Raises as `reading`."""
    with reading(path, "tokenizer", field):
        return AutoTokenizer.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
