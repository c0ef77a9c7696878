import numpy as np
import pytest
import torch
from tiny_size import TINY

from eval.ten_skills import models, world


def test_dense_labels_name_what_lies_under_a_patch():
    samples = world.make_samples("train", 40, 0, size=48)
    labels = models.dense_labels(samples, 48, 12)
    assert labels.shape == (40, 16, len(models.HEADS))
    assert (labels.reshape(-1, 5).max(axis=0) < models.HEADS).all()
    grid = labels.reshape(40, 4, 4, 5)
    scenes = samples.scenes
    for row in range(40):
        if scenes.bars[row].any():
            assert grid[row, 0, :, 4].tolist() == grid[row, 3, :, 4].tolist() == scenes.bars[row].tolist()
            colours = np.where(scenes.bars[row] > 0, scenes.colour[row] + 1, 0)
            assert grid[row, 2, :, 1].tolist() == colours.tolist()
        else:
            assert (grid[row, 0:2, 2:4, 0] == scenes.sprite[row, 1] + 1).all()
            assert (grid[row, 2:4, 0:2, 1] == (scenes.colour[row, 2] + 1) * (scenes.sprite[row, 2] >= 0)).all()


def test_the_language_model_starts_at_one_over_the_root_of_its_width():
    torch.manual_seed(0)
    model = models.build_model(TINY, (64, 1), TINY.vision)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
