"""A pair small enough for milliseconds: pictures of 32 pixels in 16 visual tokens, the package's tokenizer."""

from __future__ import annotations

import signal

import pytest
import torch

from switchkd.models.tiny import random_llava, tiny_processor, tiny_tokenizer

SMALL = {"vision_hidden": 32, "vision_layers": 2, "image_size": 32, "patch_size": 8, "layers": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_not_ignored():
    """A shell ignores SIGINT for what it runs in the background, and the processes that tests start inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(image_size=32, patch_size=8)


@pytest.fixture
def student(tokenizer):
    return random_llava(tokenizer, hidden=32, **SMALL)


@pytest.fixture
def teacher(tokenizer):
    return random_llava(tokenizer, hidden=48, **SMALL)


@pytest.fixture
def batch(tokenizer):
    """Two samples of one image each: answers of one and of two words, right padded."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    samples = [
        ("Is there any crazing in the image?", "yes"),
        ("Which defect is in the image?", "rolled-in scale"),
    ]
    rows = []
    for question, answer in samples:
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        end = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        rows.append(([image] * 16 + prompt + end, [-100] * (16 + len(prompt)) + end))
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
