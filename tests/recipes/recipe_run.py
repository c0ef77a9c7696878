"""A tiny pair on disk and runs of the recipe with it: imported by the recipe's tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import SiglipVisionModel

from switchkd.models.tiny import random_llava, tiny_processor, tiny_vision_config

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "distill_tinyllava.py"
VISION = {"image_size": 32, "patch_size": 8}


def load_recipe(name: str = "distill_tinyllava"):
    """A recipe as a fresh module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pair(folder: Path, **changes) -> Path:
    """A random teacher, another random tower, and the configuration of a run with them; its path."""
    torch.manual_seed(0)
    teacher = random_llava(hidden=48, layers=2, vision_hidden=32, vision_layers=2, **VISION)
    teacher.save_pretrained(folder / "pair/teacher")
    tiny_processor(**VISION).save_pretrained(folder / "pair/teacher")
    SiglipVisionModel(tiny_vision_config(32, 2, **VISION)).save_pretrained(folder / "pair/tower")
    config = {
        "name": "plate",
        "out": str(folder / "runs"),
        "data": {"train_images": 20, "test_images": 3, "in_memory": True},
        "teacher": {"path": str(folder / "pair/teacher")},
        "student": {"vision_tower": str(folder / "pair/tower"), "vision_feature_layer": -1},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "logging_steps": 1,
            "checkpoint_every": 2,
            "part_lr": {"vision_tower": 1e-4},
        },
        "judge": {"batch_size": 8, "max_new_tokens": 8},
    }
    for section, values in changes.items():
        config[section] |= values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start_process(*arguments: str) -> subprocess.Popen:
    """The recipe as a process of its own, in one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment)
