"""Evaluation: every term over all samples, whatever the batch size and the number of ranks."""

from __future__ import annotations

import pytest
import torch
from toy_run import ToyData, toy_collate, toy_trainer, weights_hash

from switchkd.training.evaluation import RankBatches


def by_hand(method, samples):
    """The sums of each sample alone, over the items of all."""
    sums, items = {"ce": 0.0, "align": 0.0}, 0
    for index in range(samples):
        batch = toy_collate([ToyData(samples)[index]])
        with torch.no_grad():
            terms = method.eval()(**batch, num_items_in_batch=1)
        items += int(method.count(batch))
        for name in sums:
            sums[name] += float(terms.named[name])
    means = {f"eval_{name}": value / items for name, value in sums.items()}
    return means | {"eval_loss": means["eval_ce"] + 0.5 * means["eval_align"]}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_terms_are_the_same_at_any_batch_size(tmp_path, batch_size):
    trainer = toy_trainer(tmp_path, eval_dataset=ToyData(7), batch_size=batch_size)
    measured = trainer.evaluate()
    expected = by_hand(trainer.method, 7)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name
    record = trainer.state.log_history[-1]
    assert {name: record[name] for name in expected} == {name: measured[name] for name in expected}


def test_several_sets_and_other_ones_have_their_own_numbers(tmp_path):
    trainer = toy_trainer(tmp_path, eval_dataset={"few": ToyData(3), "more": ToyData(7)})
    few, more = by_hand(trainer.method, 3), by_hand(trainer.method, 7)
    measured = trainer.evaluate()
    assert measured["eval_few_ce"] == pytest.approx(few["eval_ce"], rel=1e-5)
    assert measured["eval_more_loss"] == pytest.approx(more["eval_loss"], rel=1e-5)
    assert trainer.evaluate(ToyData(3))["eval_align"] == pytest.approx(few["eval_align"], rel=1e-5)
    assert trainer.predict(ToyData(3)).metrics["test_align"] == pytest.approx(few["eval_align"], rel=1e-5)


@pytest.mark.parametrize(("samples", "batch_size", "ranks"), [(7, 2, 2), (7, 7, 3), (1, 1, 2), (12, 3, 2), (10, 3, 4)])
def test_ranks_share_the_samples_without_repeating_any(samples, batch_size, ranks):
    shares = [RankBatches(samples, batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # as many forward passes on each
    counted = [index for share in shares for batch in share.batches[: share.own] for index in batch]
    assert sorted(counted) == list(range(samples))
    assert all(list(share)[share.own :] in ([], [list(range(min(batch_size, samples)))]) for share in shares)


def test_repeated_batches_do_not_count(tmp_path):
    whole = toy_trainer(tmp_path, eval_dataset=ToyData(7), batch_size=2).evaluate()
    trainer = toy_trainer(tmp_path, eval_dataset=ToyData(7), batch_size=2)
    loader = trainer.get_eval_dataloader()
    loader.batch_sampler.batches.append([0, 1])  # as on a rank that ran out
    measured = trainer.evaluation_loop(loader, "").metrics
    assert measured == {name: whole[name] for name in ("eval_align", "eval_ce", "eval_loss")}


def test_evaluation_changes_nothing_of_the_training(tmp_path):
    plain = toy_trainer(tmp_path / "plain")
    plain.train()
    settings = {"eval_strategy": "steps", "eval_steps": 1}
    evaluated = toy_trainer(tmp_path / "evaluated", eval_dataset=ToyData(5), **settings)
    evaluated.train()
    assert len([record for record in evaluated.state.log_history if "eval_ce" in record]) == 6
    assert weights_hash(evaluated.method) == weights_hash(plain.method)


def test_nothing_to_measure_is_said(tmp_path):
    with pytest.raises(ValueError, match="give DistillTrainer an eval_dataset"):
        toy_trainer(tmp_path).evaluate()
    with pytest.raises(ValueError, match="give DistillTrainer an eval_dataset"):
        toy_trainer(tmp_path, eval_dataset=ToyData(0)).evaluate()
    trainer = toy_trainer(tmp_path, eval_dataset=ToyData(3))
    trainer.method.count = lambda batch: 0
    with pytest.raises(ValueError, match="count finds no item in the evaluation set"):
        trainer.evaluate()


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func"])
def test_what_would_be_ignored_is_refused(tmp_path, name):
    trainer = toy_trainer(tmp_path)
    options = {name: lambda *given: {}}
    with pytest.raises(ValueError, match=f"DistillTrainer does nothing with {name}: leave it out"):
        type(trainer)(trainer.method, trainer.args, trainer.train_dataset, data_collator=toy_collate, **options)


def test_evaluation_before_training_under_deepspeed_is_refused(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, eval_dataset=ToyData(3))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="call train first"):
        trainer.evaluate()
