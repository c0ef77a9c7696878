import json
import math

import numpy as np
import torch
from tiny_size import TINY
from torch.utils.data import SequentialSampler

from eval.ten_skills import models, words, world
from eval.ten_skills.fast_step import Feed, _decode, draw, orders, score, train
from switchkd.data import Collator, encode
from switchkd.methods import SwitchKD
from switchkd.training import DistillTrainer, training_arguments
from switchkd.training.config import TrainConfig


class InOrder(DistillTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def _pair():
    """In float64, where rounding cannot turn a gradient of zero into a step of Adam."""
    torch.manual_seed(0)
    teacher = models.build_model(TINY, TINY.teacher, TINY.vision).double()
    student = models.build_model(TINY, TINY.student, TINY.vision).double()
    return SwitchKD(student, teacher, align="dbild", switch="forward_kl")


def test_two_steps_are_those_of_the_distil_trainer(samples, tmp_path):
    taken = samples[:22]
    ours, losses = _pair(), []
    feed = Feed.of(taken, TINY.image_tokens)
    order = torch.arange(22).view(2, 11)
    train(ours, feed, order, lr=1e-3, warmup=0.5, each=lambda step, named: losses.append(named))

    theirs = _pair()
    processor = words.processor(TINY.image, TINY.patch)
    encoded = [encode(each, processor) for each in world.conversations(taken)]
    config = TrainConfig(steps=2, batch_size=11, lr=1e-3, warmup_ratio=0.5, weight_decay=0.0, logging_steps=1)
    collate = Collator(processor.tokenizer.pad_token_id)
    trainer = InOrder(theirs, training_arguments(config, tmp_path), encoded, data_collator=collate)
    trainer.train()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    for step, named in enumerate(losses):
        for name, value in named.items():
            assert math.isclose(float(value), logged[step][name], rel_tol=1e-6), (step, name)
    moved = 0.0
    start = _pair().student.state_dict()
    for name, weight in theirs.student.state_dict().items():
        torch.testing.assert_close(ours.student.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
        moved = max(moved, float((weight - start[name]).abs().max()))
    assert moved > 1e-3  # two steps of Adam: the comparison above says something


def test_a_feed_holds_what_the_processor_makes(samples):
    processor = words.processor(48, 12)
    feed = Feed.of(samples, 16)
    batch = feed.batch(slice(0, 22))
    for row, each in enumerate(world.conversations(samples[:22])):
        encoded = encode(each, processor)
        length = len(encoded["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == encoded["input_ids"].tolist()
        assert (batch["input_ids"][row, length:] == words.PAD_ID).all()
        assert batch["labels"][row, :length].tolist() == encoded["labels"].tolist()
        torch.testing.assert_close(batch["pixel_values"][row], encoded["pixel_values"][0], rtol=0, atol=1e-6)
    assert not feed.batch(slice(0, 2), blank=True)["pixel_values"].any()


def test_captioned_samples_are_spread_over_the_skills_and_the_rest_stays_as_it_is(samples):
    asked, mixed = Feed.of(samples, 16), Feed.of(samples, 16, captioned=0.5)
    locate = samples.skills == samples.names.index(world.LOCATE)
    is_same = (mixed.input_ids[:, : asked.input_ids.shape[1]] == asked.input_ids).all(dim=1).numpy()
    for place, name in enumerate(world.SKILLS):
        assert is_same[samples.skills == place].tolist() == [True, False, True, False], name
    assert is_same[locate].all()
    assert (mixed.labels[is_same][:, asked.labels.shape[1] :] == -100).all()
    told = Feed.of(samples, 16, captioned=1.0)
    assert (told.input_ids[~locate, 16] == words.ANSWER_ID).all()
    assert (told.labels[~locate, 17] != -100).all()
    assert told.labels[11, 17:].tolist() == told.input_ids[11, 17:].where(told.input_ids[11, 17:] > 0, -100).tolist()


def test_samples_drawn_in_chunks_are_those_drawn_at_once():
    whole = world.make_samples("validation", 700, 1, skills=(*world.SKILLS, world.LOCATE), size=32)
    chunks = draw("validation", 700, 1, 32)
    for name in ("images", "questions", "answers", "skills", "ids"):
        assert np.array_equal(getattr(chunks, name), getattr(whole, name)), name
    assert np.array_equal(chunks.scenes.bars, whole.scenes.bars)


def test_orders_are_whole_passes():
    order = orders(30, 7, 10, seed=3)
    assert order.shape == (7, 10)
    for start in (0, 30):
        assert sorted(order.flatten()[start : start + 30].tolist()) == list(range(30))
    assert not torch.equal(order, orders(30, 7, 10, seed=4))


def test_score_is_exact_match_under_greedy_decoding(samples):
    torch.manual_seed(0)
    model = models.build_model(TINY, TINY.student, TINY.vision)
    feed = Feed.of(samples, TINY.image_tokens)

    def says(right):
        """A head that gives the known tokens to the samples where `right` holds."""
        tokens = feed.input_ids.roll(-1, dims=1)
        tokens[~torch.as_tensor(right)] = words.PAD_ID
        state = {"at": 0}

        def head(hidden):
            rows = slice(state["at"], state["at"] + len(hidden))
            return torch.nn.functional.one_hot(tokens[rows, : hidden.shape[1]], len(world.VOCABULARY)).float()

        return head

    skip = [name for name in feed.samples.names if name != world.LOCATE]

    every = np.ones(len(feed), bool)
    half = every.copy()
    half[samples.skills == world.SKILLS.index("chart")] = False
    for right, chart in ((every, 100.0), (half, 0.0)):
        model.lm_head.forward = says(right)
        found = score(model, feed)
        assert found["chart"] == chart
        assert all(found[name] == 100 for name in skip if name != "chart")


def test_a_box_is_decoded_token_by_token():

    torch.manual_seed(1)
    model = models.build_model(TINY, TINY.student, TINY.vision)
    feed = Feed.of(world.make_samples("train", 6, 0, skills=(world.LOCATE,), size=48), TINY.image_tokens)
    batch = feed.batch(slice(0, 6))
    answers = _decode(model.eval(), batch)
    starts = (batch["labels"] != -100).int().argmax(dim=1)
    for row, start in enumerate(starts):
        prompt = batch["input_ids"][row : row + 1, :start]
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=batch["pixel_values"][row : row + 1],
            max_new_tokens=world.ANSWER_LENGTH,
            do_sample=False,
            eos_token_id=None,
        )
        assert made[0, start:].tolist() == answers[row].tolist()


def test_an_image_token_in_an_answer_is_a_wrong_answer(samples):
    model = models.build_model(TINY, TINY.student, TINY.vision)
    weight = torch.zeros(len(world.VOCABULARY))
    weight[words.IMAGE_ID] = 1.0
    model.lm_head.forward = lambda hidden: weight.expand(*hidden.shape[:2], -1)
    assert set(score(model, Feed.of(samples, TINY.image_tokens)).values()) == {0.0}
