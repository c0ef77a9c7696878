import math

import numpy as np
import pytest
import torch
from tiny_size import TINY

from eval.records import Refused, digest
from eval.ten_skills import models
from eval.ten_skills.fast_step import Feed, draw
from eval.ten_skills.own_methods import LlavaKD, Scheduled, SeenOnly
from eval.ten_skills.sizes import SIZES
from eval.ten_skills.variants import PIECES, VARIANTS, Variant, listens, variant
from switchkd.methods import SwitchKD
from switchkd.models import freeze


@pytest.mark.parametrize("name", SIZES)
def test_both_sizes_build_and_every_variant_takes_a_step(name):
    size = SIZES[name]
    torch.manual_seed(0)
    teacher = models.build_model(size, size.teacher, size.vision)
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    if name == "gpu":
        assert 5e6 < parameters < 8e6
    feed = Feed.of(draw("train", 11, 0, size.image), size.image_tokens)
    for row in VARIANTS.values():
        if name == "gpu" and row.name not in ("switch_kd", "narrow_switch", "kl_seen"):
            continue
        student = models.build_model(size, size.student, size.narrow if row.narrow else size.vision)
        freeze(student, row.freeze)
        batch = feed.batch(slice(0, 11))
        terms = row.method(student, teacher, batch["pixel_values"])(**batch)
        terms.loss.backward()
        assert torch.isfinite(terms.loss)
        options = row.options or {}
        wanted = {"ce"} | {key for key in ("align", "switch", "feature") if options.get(key)}
        wanted |= {key for key in ("visual", "relation") if options.get(f"{key}_weight")}
        assert set(terms.named) == wanted, row.name
        tower = student.model.vision_tower.embeddings.patch_embedding.weight
        assert (tower.grad is None) == bool(row.freeze), row.name


def test_pieces_name_each_variant_once_but_for_the_few():
    names = [variant.name for piece, variants in PIECES.items() if piece != "few" for variant in variants]
    assert len(set(names)) == len(names) == len(VARIANTS)
    for size in SIZES.values():
        assert set(size.pieces) <= set(PIECES)


def test_scheduled_terms_keep_their_mean_weight():
    torch.manual_seed(0)
    pair = [models.build_model(TINY, width, TINY.vision) for width in (TINY.student, TINY.teacher)]
    method = Scheduled(*pair, late=False, align="forward_kl", switch="forward_kl", switch_weight=3.0)
    seen = []
    for step in range(101):
        method.progress(step / 100)
        seen.append(method.weights["switch"])
        assert method.weights["ce"] == 1.0
    assert seen[0] == pytest.approx(6.0)
    assert seen[-1] == pytest.approx(0.0)
    assert np.mean(seen) == pytest.approx(3.0)


def test_visual_terms_are_means_over_image_tokens_of_whole_passes(samples):
    torch.manual_seed(0)
    student = models.build_model(TINY, TINY.student, TINY.vision)
    teacher = models.build_model(TINY, TINY.teacher, TINY.vision)
    batch = Feed.of(samples, TINY.image_tokens).batch(slice(0, 22))
    options = {"align": None, "switch": None, "visual_weight": 2.0, "relation_weight": 0.5}
    terms = LlavaKD(student, teacher, **options)(**batch)
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    ours, theirs = (model(**inputs).logits[:, : TINY.image_tokens].double() for model in (student, teacher))
    ratio = theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))
    assert float(terms.named["visual"]) == pytest.approx(float(ratio.sum(-1).mean()), rel=1e-4)
    alike = []
    for logits in (ours, theirs):
        directions = logits / logits.norm(dim=-1, keepdim=True)
        alike.append(torch.einsum("btv,bsv->bts", directions, directions).flatten(1))
    cosine = (alike[0] * alike[1]).sum(1) / (alike[0].norm(dim=1) * alike[1].norm(dim=1))
    assert float(terms.named["relation"]) == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    wanted = terms.named["ce"] + 2.0 * terms.named["visual"] + 0.5 * terms.named["relation"]
    assert float(terms.loss) == pytest.approx(float(wanted), rel=1e-5)
    terms.loss.backward()
    assert student.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_positions_count_where_the_picture_changes_the_teacher(samples):
    torch.manual_seed(0)
    student = models.build_model(TINY, TINY.student, TINY.vision)
    teacher = models.build_model(TINY, TINY.teacher, TINY.vision)
    batch = Feed.of(samples, TINY.image_tokens).batch(slice(0, 22))
    plain = SwitchKD(student, teacher, align="forward_kl", switch="forward_kl")(**batch).named
    seen = VARIANTS["kl_seen"].method(student, teacher, batch["pixel_values"])
    seen.nats = 0.0  # any change counts, and every position changes at least a little
    assert seen(**batch).named["align"] == pytest.approx(float(plain["align"]), rel=1e-4)
    seen.nats = math.inf
    assert seen(**batch).named["align"] == 0.0 == seen(**batch).named["switch"]


def squared(student_logits, teacher_logits):
    return (student_logits - teacher_logits).pow(2).mean(dim=-1)


def test_a_function_works_as_a_variant_and_its_name_is_the_same_one(samples):
    torch.manual_seed(0)
    student = models.build_model(TINY, TINY.student, TINY.vision)
    teacher = models.build_model(TINY, TINY.teacher, TINY.vision)
    batch = Feed.of(samples, TINY.image_tokens).batch(slice(0, 22))
    name = f"{__name__}:squared"
    given = Variant("mine", "why", {"align": squared, "switch": squared})
    assert variant(name).settings() == given.settings()
    assert digest(variant(name).settings()) == digest(given.settings())
    both = [each.method(student, teacher, batch["pixel_values"])(**batch).named for each in (given, variant(name))]
    assert both[0].keys() == {"ce", "align", "switch"}
    assert both[0] == both[1]
    seen = Variant("mine_seen", "why", {"align": squared, "switch": name}, kind=SeenOnly)
    assert seen.method(student, teacher, batch["pixel_values"])(**batch).named.keys() == {"ce", "align", "switch"}
    plain = Variant("kl", "why", {"align": "forward_kl", "switch": None})
    assert plain.settings()["options"] == {"align": "forward_kl", "switch": None}
    assert listens(name)


def test_a_function_that_a_table_could_not_know_again_is_refused():
    with pytest.raises(ValueError, match="give a function that its module holds by name"):
        digest(Variant("mine", "why", {"align": lambda student, teacher: student}).settings())
    with pytest.raises(Refused, match="OrderedDict.* stands in a variant: give a function that its module holds by"):
        variant("collections:OrderedDict")
