"""Batches of samples of about one length: every sample once an epoch, in an order that a resume finds again."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy_run import broken_run, resumed_run, toy_trainer, weights_hash
from transformers.trainer_pt_utils import get_length_grouped_indices

from switchkd.training.order import LengthGrouped, sample_lengths

LENGTHS = torch.randint(10, 2000, (400,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(order, batch=8):
    batches = [[LENGTHS[index] for index in order[start : start + batch]] for start in range(0, len(order), batch)]
    return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches) / sum(LENGTHS)


def test_every_sample_once_an_epoch_with_little_padding():
    sampler = LengthGrouped(LENGTHS, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(400))
    assert len(sampler) == 400
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    assert padding(shuffled) > 0.5
    assert padding(order) < 0.15


def test_steps_come_in_random_order_of_length():
    order = list(LengthGrouped(LENGTHS, 8, seed=3))
    steps = [sum(LENGTHS[index] for index in order[start : start + 8]) for start in range(0, 400, 8)]
    falls = sum(before > after for before, after in itertools.pairwise(steps))
    assert 15 < falls < 34  # of 49; sorted megabatches fall nearly always


def test_a_last_step_that_is_not_full_stays_last():
    lengths = LENGTHS[:43]
    order = list(LengthGrouped(lengths, 8, seed=0))
    assert sorted(order) == list(range(43))
    grouped = get_length_grouped_indices(lengths, 8, generator=torch.Generator().manual_seed(0))
    assert order[40:] == grouped[40:]
    assert order[:40] != grouped[:40]


def test_order_follows_seed_and_epoch_alone():
    first, same, other_seed, later = (LengthGrouped(LENGTHS, 8, seed) for seed in (3, 3, 4, 3))
    later.set_epoch(1)
    torch.manual_seed(5)
    orders = [list(sampler) for sampler in (first, same, other_seed, later)]
    assert orders[0] == orders[1] == list(first)
    assert orders[2] != orders[0]
    assert orders[3] != orders[0]


def test_lengths_of_encoded_samples_and_of_what_has_none():
    assert sample_lengths([{"input_ids": torch.zeros(3)}, {"input_ids": torch.zeros(5)}]) == [3, 5]
    with pytest.raises(ValueError, match="group_by_length is set but tuple has no `lengths`"):
        sample_lengths((1, 2))


def test_the_trainer_sees_neighbours_of_one_length_and_another_order_each_epoch(tmp_path):
    trainer = toy_trainer(tmp_path, samples=64, batch_size=4, steps=32, group_by_length=True, checkpoint_every=0)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: (seen.append([len(s["input_ids"]) for s in samples]), collate(samples))[1]
    trainer.train()
    assert len(seen) == 32
    spread = sum(max(lengths) - min(lengths) for lengths in seen) / len(seen)
    assert spread < 1.5  # of lengths 7 to 12; 3.4 on average at random
    assert seen[:16] != seen[16:]


def test_grouped_run_resumes_bit_for_bit(tmp_path):
    whole = resumed_run(tmp_path / "whole", group_by_length=True)
    plain = resumed_run(tmp_path / "plain")
    broken_run(tmp_path / "broken", group_by_length=True)
    resumed = resumed_run(tmp_path / "broken", group_by_length=True)
    assert weights_hash(resumed.method) == weights_hash(whole.method)
    assert weights_hash(plain.method) != weights_hash(whole.method)
    broken_run(tmp_path / "other", group_by_length=True)
    with pytest.raises(ValueError, match="group_by_length was True and is now False"):
        resumed_run(tmp_path / "other")
