"""The switch where the student's vision features have another width or another number of visual tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from switchkd import losses
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.methods.pair_checks import check_features_meet
from switchkd.models import freeze
from switchkd.models.adapter import LinearAdapter, fit_switch_adapter
from switchkd.models.pathway import LlavaPathway, pathway_of
from switchkd.models.tiny import random_llava

SHAPE = {"vision_layers": 2, "image_size": 32, "patch_size": 8, "layers": 2}


@pytest.fixture
def narrow(tokenizer):
    """16 visual tokens as the teacher's, 24 wide instead of 32."""
    return random_llava(tokenizer, hidden=32, vision_hidden=24, **SHAPE)


def answer_logits(model, batch, features):
    """[answer tokens, vocabulary] by the plain way: stock forward over given features, shift, mask."""
    embedded = model.get_input_embeddings()(batch["input_ids"])
    places = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
    tokens = model.model.multi_modal_projector(features)
    embedded = embedded.masked_scatter(places, tokens.flatten(0, 1))
    logits = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


# ---- Widths


def test_a_narrower_student_is_switched_through_the_adapter(narrow, teacher, batch):
    adapter = LinearAdapter.between(narrow, teacher)
    terms = SwitchKD(narrow, teacher, switch_adapter=adapter)(**batch)
    pixels = batch["pixel_values"]
    z_t = answer_logits(teacher, batch, pathway_of(teacher).encode(pixels))
    z_switch = answer_logits(teacher, batch, adapter.linear(pathway_of(narrow).encode(pixels)))
    assert terms.named["switch"].item() == pytest.approx(losses.dbild_loss(z_switch, z_t).mean().item(), rel=1e-4)
    z_s = answer_logits(narrow, batch, pathway_of(narrow).encode(pixels))
    assert terms.named["align"].item() == pytest.approx(losses.dbild_loss(z_s, z_t).mean().item(), rel=1e-4)


def test_the_switch_gradient_reaches_tower_and_adapter_and_nothing_else(narrow, teacher, batch):
    freeze(narrow)
    adapter = LinearAdapter.between(narrow, teacher)
    method = SwitchKD(narrow, teacher, align=None, switch_adapter=adapter)
    method(**batch).loss.backward()
    with_switch = {name: p.grad.clone() for name, p in narrow.named_parameters() if p.grad is not None}
    narrow.zero_grad()
    SupervisedMethod(narrow)(**batch).loss.backward()
    for name, parameter in narrow.named_parameters():
        if parameter.grad is not None and not name.startswith("model.vision_tower"):
            assert torch.allclose(with_switch[name], parameter.grad, atol=1e-7), name
    patches = "model.vision_tower.embeddings.patch_embedding.weight"
    assert (with_switch[patches] - narrow.get_parameter(patches).grad).abs().max() > 1e-5
    assert adapter.linear.weight.grad.abs().max() > 1e-5
    assert adapter.linear.bias.grad.abs().max() > 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_an_adapter_that_fits_exactly_leaves_no_switch_term(tokenizer, teacher, batch):
    """The student's features are two layers of the teacher's own tower side by side, so a linear map picks one."""
    student = random_llava(tokenizer, hidden=32, vision_hidden=32, **SHAPE)
    config = student.config
    config.vision_feature_layer = [-2, -1]
    student = type(student)(config)
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    random = SwitchKD(student, teacher, switch_adapter=LinearAdapter.between(student, teacher))
    adapter = fit_switch_adapter(student, teacher, [torch.randn(64, 3, 32, 32)])
    assert adapter.r2 == pytest.approx(1.0, abs=1e-6)
    fitted = SwitchKD(student, teacher, switch="forward_kl", feature="cosine", switch_adapter=adapter)(**batch)
    assert fitted.named["switch"].abs() < 1e-6
    assert fitted.named["feature"].abs() < 1e-5
    assert random(**batch).named["switch"] > 1e-4


def test_a_narrower_student_learns_to_be_read_by_the_teacher(narrow, teacher, batch):
    freeze(narrow)
    adapter = fit_switch_adapter(narrow, teacher, [batch["pixel_values"]], ridge=1.0)
    method = SwitchKD(narrow, teacher, switch="forward_kl", switch_weight=20.0, switch_adapter=adapter)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert {"switch_adapter.linear.weight", "switch_adapter.linear.bias"} < trained
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    before = adapter.linear.weight.detach().clone()
    seen = []
    for _ in range(12):
        terms = method(**batch)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        seen.append(terms.named["switch"].item())
    assert seen[-1] < 0.5 * seen[0]
    assert not torch.equal(adapter.linear.weight, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_teacher_reads_through_a_float32_adapter(narrow, teacher, batch, autocast):
    adapter = LinearAdapter.between(narrow, teacher)
    method = SwitchKD(narrow, teacher, switch="forward_kl", switch_adapter=adapter)
    full = method(**batch).named["switch"].item()
    teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = method(**batch)
    terms.loss.backward()
    assert terms.named["switch"].item() == pytest.approx(full, rel=0.05, abs=2e-3)
    assert adapter.linear.weight.grad.dtype == torch.float32


# ---- Numbers of visual tokens


@pytest.fixture
def coarse_batch(batch):
    """The same two samples with 4 image tokens each, as a tower with patches of 16 encodes them."""
    return {name: value if name == "pixel_values" else value[:, 12:] for name, value in batch.items()}


@pytest.mark.parametrize(("width", "coarse"), [(32, "student"), (24, "student"), (32, "teacher"), (24, "teacher")])
def test_other_numbers_of_visual_tokens_by_hand(tokenizer, batch, coarse_batch, width, coarse):
    patches = {"student": 8, "teacher": 8} | {coarse: 16}
    student = random_llava(tokenizer, hidden=32, vision_hidden=width, **(SHAPE | {"patch_size": patches["student"]}))
    teacher = random_llava(tokenizer, hidden=48, vision_hidden=32, **(SHAPE | {"patch_size": patches["teacher"]}))
    students, teachers = (coarse_batch, batch) if coarse == "student" else (batch, coarse_batch)
    adapter = LinearAdapter.between(student, teacher)
    terms = SwitchKD(student, teacher, feature="cosine", switch_adapter=adapter)(**students)

    pixels = batch["pixel_values"]
    ours, theirs = (pathway_of(model).encode(pixels) for model in (student, teacher))
    adapted = adapter(ours)
    assert adapted.shape == theirs.shape
    z_s, z_t = answer_logits(student, students, ours), answer_logits(teacher, teachers, theirs)
    z_switch = answer_logits(teacher, teachers, adapted)
    targets = [b["labels"][:, 1:][b["labels"][:, 1:] != -100] for b in (students, teachers)]
    assert torch.equal(*targets)
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    cosines = (1 - torch.cosine_similarity(adapted, theirs, dim=-1)).mean(-1)
    expected = {
        "ce": torch.nn.functional.cross_entropy(z_s, targets[0]),
        "align": losses.dbild_loss(z_s, z_t).mean(),
        "switch": losses.dbild_loss(z_switch, z_t).mean(),
        "feature": (cosines * tokens).sum() / tokens.sum(),
    }
    assert list(terms.named) == list(expected)
    for name, value in expected.items():
        assert terms.named[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_the_teacher_reads_the_same_text_behind_its_own_number_of_image_tokens(
    tokenizer, teacher, batch, coarse_batch, monkeypatch
):
    student = random_llava(tokenizer, hidden=32, vision_hidden=32, **(SHAPE | {"patch_size": 16}))
    read, decode = [], LlavaPathway.decode

    def recorded(path, input_ids, attention_mask, *rest, **options):
        read.append((path.model, input_ids, attention_mask))
        return decode(path, input_ids, attention_mask, *rest, **options)

    monkeypatch.setattr(LlavaPathway, "decode", recorded)
    SwitchKD(student, teacher, switch_adapter=LinearAdapter.between(student, teacher))(**coarse_batch)
    assert [model for model, *_ in read] == [student, teacher, teacher]
    for _, ids, mask in read[1:]:
        assert torch.equal(ids, batch["input_ids"])
        assert torch.equal(mask, batch["attention_mask"])


def test_the_align_term_alone_needs_no_adapter(tokenizer, teacher, batch, coarse_batch):
    student = random_llava(tokenizer, hidden=32, vision_hidden=24, **(SHAPE | {"patch_size": 16}))
    terms = SwitchKD(student, teacher, switch=None)(**coarse_batch)
    pixels = batch["pixel_values"]
    z_s = answer_logits(student, coarse_batch, pathway_of(student).encode(pixels))
    z_t = answer_logits(teacher, batch, pathway_of(teacher).encode(pixels))
    assert terms.named["align"].item() == pytest.approx(losses.dbild_loss(z_s, z_t).mean().item(), rel=1e-4)


def test_batches_without_images_keep_tower_and_adapter_in_the_graph(tokenizer, teacher, batch):
    """Every rank must run the same modules, and have a gradient for them."""
    student = random_llava(tokenizer, hidden=32, vision_hidden=24, **(SHAPE | {"patch_size": 16}))
    adapter = LinearAdapter.between(student, teacher)
    text = {name: value[:, 16:] for name, value in batch.items() if name != "pixel_values"}
    terms = SwitchKD(student, teacher, feature="relation", switch_adapter=adapter)(**text)
    terms.loss.backward()
    assert terms.named["align"] > 0
    assert terms.named["switch"].abs() < 1e-6
    assert terms.named["feature"] == 0
    assert adapter.linear.weight.grad.abs().max() == 0


# ---- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_hidden": 48},
            r"are 48 wide .* reads 32: .*, give a switch_adapter \(linear\), or set switch",
        ),
        ({"patch_size": 16}, r"16, 4 tokens, the teacher 32 px in patches of 8, 16 .* switch_adapter \(linear\), or"),
    ],
)
def test_without_an_adapter_other_features_are_an_error_that_names_it(tokenizer, teacher, change, message):
    student = random_llava(tokenizer, **({"hidden": 32, "vision_hidden": 32} | SHAPE | change))
    with pytest.raises(ValueError, match=message):
        SwitchKD(student, teacher)
    with pytest.raises(ValueError, match=message.replace("set switch", "set feature")):
        SwitchKD(student, teacher, switch=None, feature="cosine")


def test_an_adapter_that_is_not_needed_or_not_read_is_refused(student, teacher, narrow):
    with pytest.raises(ValueError, match="both have 16 visual tokens of width 32: there is nothing to adapt, drop it"):
        SwitchKD(student, teacher, switch_adapter=LinearAdapter(32, 32, 16, 16))
    with pytest.raises(ValueError, match="switch_adapter is given but switch and feature are None"):
        SwitchKD(narrow, teacher, switch=None, switch_adapter=LinearAdapter.between(narrow, teacher))


def test_an_adapter_of_another_pair_is_refused(narrow, teacher):
    adapter = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 40))
    said = r"makes \(1, 16, 40\) of the student's features \(1, 16, 24\), and the teacher's are \(1, 16, 32\)"
    with pytest.raises(ValueError, match=said):
        SwitchKD(narrow, teacher, switch_adapter=adapter)
    own = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 32))
    check_features_meet(narrow, teacher, own, ["switch"], equal_widths=False)
    assert own[0].training  # as it was
    assert SwitchKD(narrow, teacher, switch_adapter=own).switch_adapter is own


def test_pictures_of_two_sizes_are_refused_with_an_adapter_too(tokenizer, teacher):
    student = random_llava(tokenizer, **({"hidden": 32, "vision_hidden": 24} | SHAPE | {"image_size": 64}))
    with pytest.raises(ValueError, match="one encoded picture is read by student and teacher; the student has 64 px"):
        SwitchKD(student, teacher, switch_adapter=LinearAdapter.between(student, teacher))


def test_a_frozen_narrow_tower_is_refused(narrow, teacher):
    freeze(narrow, ["vision_tower"])
    with pytest.raises(ValueError, match="switch term trains the student's vision tower alone, and that is frozen"):
        SwitchKD(narrow, teacher, switch_adapter=LinearAdapter.between(narrow, teacher))


class Detached(LinearAdapter):
    def forward(self, features):
        return super().forward(features).detach()


@pytest.mark.parametrize("terms", [{}, {"switch": None, "feature": "relation"}])
def test_an_adapter_that_would_not_be_trained(narrow, teacher, batch, terms):
    adapter = LinearAdapter.between(narrow, teacher).requires_grad_(False)
    with pytest.raises(ValueError, match="switch_adapter is frozen, all 2 parameters of it, and it trains along"):
        SwitchKD(narrow, teacher, switch_adapter=adapter, **terms)
    adapter = LinearAdapter.between(narrow, teacher)
    adapter.linear = nn.Linear(24, 32, bias=False)
    adapter.linear.weight = nn.Parameter(teacher.model.multi_modal_projector.linear_1.weight.data[:, :24])
    with pytest.raises(ValueError, match="switch adapter and teacher share 1 parameters, the first linear.weight, and"):
        SwitchKD(narrow, teacher, switch_adapter=adapter, **terms)
    method = SwitchKD(narrow, teacher, switch_adapter=Detached(24, 32, 16, 16), **terms).train()
    with pytest.raises(ValueError, match="no gradient reaches that"):
        method(**batch)


def test_a_tower_behind_an_adapter_that_is_frozen_later(narrow, teacher, batch):
    method = SwitchKD(narrow, teacher, switch_adapter=LinearAdapter.between(narrow, teacher)).train()
    method(**batch)
    freeze(narrow, ["vision_tower"])
    with pytest.raises(ValueError, match="no gradient reaches that: it has been frozen since the pair was made"):
        method(**batch)
