import copy
import logging

import pytest
import torch

from switchkd import losses
from switchkd.methods import SupervisedMethod, SwitchKD
from switchkd.models import freeze
from switchkd.models.tiny import random_llava


def answer_logits(model, batch, pixels=None, features_of=None):
    """[answer tokens, vocabulary] by the plain way: stock forward, shift, mask."""
    if features_of is None:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
        ).logits
    else:
        tower = features_of.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        tokens = model.model.multi_modal_projector(tower.hidden_states[-1])
        embedded = model.get_input_embeddings()(batch["input_ids"])
        places = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        embedded = embedded.masked_scatter(places, tokens.flatten(0, 1))
        logits = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


def test_terms_equal_the_plain_full_logits_form(student, teacher, batch):
    terms = SwitchKD(student, teacher, align_weight=0.5, switch_weight=2.0)(**batch)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    z_s, z_t = answer_logits(student, batch), answer_logits(teacher, batch)
    z_switch = answer_logits(teacher, batch, features_of=student)
    expected = {
        "ce": torch.nn.functional.cross_entropy(z_s, targets),
        "align": losses.dbild_loss(z_s, z_t).mean(),
        "switch": losses.dbild_loss(z_switch, z_t).mean(),
    }
    assert terms.named.keys() == expected.keys()
    for name, value in expected.items():
        assert terms.named[name].item() == pytest.approx(value.item(), rel=1e-4), name
    total = expected["ce"] + 0.5 * expected["align"] + 2.0 * expected["switch"]
    assert terms.loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_switch_gradient_reaches_the_students_vision_tower_and_nothing_else(student, teacher, batch):
    method = SwitchKD(student, teacher, align=None)
    method(**batch).loss.backward()
    with_switch = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    SupervisedMethod(student)(**batch).loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and not name.startswith("model.vision_tower"):
            assert torch.allclose(with_switch[name], parameter.grad, atol=1e-7), name
    patches = "model.vision_tower.embeddings.patch_embedding.weight"
    difference = with_switch[patches] - student.get_parameter(patches).grad
    assert difference.abs().max() > 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_the_vision_tower_of_the_student_runs_once_and_the_teachers_under_no_grad(student, teacher, batch):
    runs = []
    student.model.vision_tower.register_forward_hook(lambda *_: runs.append("student"))
    teacher.model.vision_tower.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    SwitchKD(student, teacher)(**batch)
    assert runs == ["student", False]


def test_teacher_stays_in_eval_mode_while_training(student, teacher):
    method = SwitchKD(student, teacher)
    method.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())


def test_gradient_checkpointing_recomputes_on_the_switch_path_and_changes_nothing(student, teacher, batch):
    def run(checkpointing):
        calls = []
        layer = teacher.model.language_model.layers[0].mlp
        # before, not after: a recompute stops as soon as it has what backward needs
        hook = layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        student.zero_grad()
        SwitchKD(student, teacher, gradient_checkpointing=checkpointing).train()(**batch).loss.backward()
        hook.remove()
        return len(calls), student.model.vision_tower.embeddings.patch_embedding.weight.grad.clone()

    plain_calls, plain = run(False)
    calls, checkpointed = run(True)
    assert plain_calls == 2  # the teacher's own pass and the switch pass
    assert calls == 3  # and the switch pass again in backward
    assert torch.equal(plain, checkpointed)


def test_one_word_answers_are_distilled(student, teacher, batch):
    one = {name: value[:1] for name, value in batch.items()}
    answer = one["labels"][one["labels"] != -100]
    assert len(answer) == 2  # the word and the end of the turn
    only_word = one["labels"].clone()
    only_word[only_word == answer[-1]] = -100
    terms = SwitchKD(student, teacher, align="forward_kl", switch="forward_kl")(**{**one, "labels": only_word})
    assert terms.named["align"] > 0
    assert terms.named["switch"] > 0


@pytest.mark.parametrize("kind", ["supervised", "switch"])
def test_two_accumulation_steps_equal_one_large_batch(student, teacher, batch, kind):
    method = SupervisedMethod(student) if kind == "supervised" else SwitchKD(student, teacher)
    method(**batch).loss.backward()
    large = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for row in range(2):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        method(**part, num_items_in_batch=tokens).loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, large[name], atol=1e-6, rtol=1e-4), name


def test_equal_frozen_encoders_are_refused(student, teacher):
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    freeze(student, ["vision_tower"])
    with pytest.raises(ValueError, match="share one frozen vision tower.*switch term is exactly zero: unfreeze"):
        SwitchKD(student, teacher)
    assert SwitchKD(student, teacher, switch=None).switch is None


def test_a_frozen_encoder_of_its_own_is_refused(student, teacher):
    freeze(student, ["vision_tower"])
    with pytest.raises(ValueError, match="trains the student's vision tower alone, and that is frozen"):
        SwitchKD(student, teacher)


def other_half(teacher):
    """A tower of its own whose patches lie in the teacher's memory."""
    tower = copy.deepcopy(teacher.model.vision_tower)
    tower.embeddings.patch_embedding.weight.data = teacher.model.vision_tower.embeddings.patch_embedding.weight.data
    return tower


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (
            lambda student, teacher: setattr(student.model, "vision_tower", teacher.model.vision_tower),
            r"student and teacher share \d\d parameters, the first model.vision_tower.e.*: give the student its own",
        ),
        (
            lambda student, teacher: setattr(student.model, "vision_tower", other_half(teacher)),
            "student and teacher share 1 parameters, the first model.vision_tower.embeddings.patch_embedding.weight",
        ),
        (
            lambda student, teacher: setattr(student.model.vision_tower, "encoder", teacher.model.vision_tower.encoder),
            r"share \d\d parameters, the first model.vision_tower.encoder.layers.0",
        ),
    ],
)
@pytest.mark.parametrize("terms", [{}, {"switch": None}, {"align": None, "switch": None, "feature": "cosine"}])
def test_what_the_teacher_shares_with_the_student_is_refused(student, teacher, share, said, terms):
    share(student, teacher)
    with pytest.raises(ValueError, match=said):
        SwitchKD(student, teacher, **terms)
    assert all(weight.requires_grad for weight in student.parameters())  # nothing was frozen on the way


def test_other_parts_that_are_shared(tokenizer, student):
    with pytest.raises(ValueError, match="student and teacher share .* the first model.vision_tower"):
        SwitchKD(student, student)
    teacher = random_llava(tokenizer, hidden=32, vision_hidden=32, vision_layers=2, image_size=32, patch_size=8)
    projector, language_model = student.model.multi_modal_projector, student.model.language_model
    student.model.multi_modal_projector = teacher.model.multi_modal_projector
    with pytest.raises(ValueError, match="share 4 parameters, the first model.multi_modal_projector.linear_1.weight"):
        SwitchKD(student, teacher)
    student.model.multi_modal_projector = projector
    student.model.language_model = teacher.model.language_model
    with pytest.raises(ValueError, match="share .* the first model.language_model.embed_tokens.weight"):
        SwitchKD(student, teacher)
    student.model.language_model = language_model
    SwitchKD(student, teacher)


@pytest.mark.parametrize("terms", [{}, {"align": None}, {"switch": None, "feature": "relation"}])
@pytest.mark.parametrize(
    "stop",
    [
        lambda student, teacher: student.model.vision_tower.requires_grad_(False),
        lambda student, teacher: freeze(student, ["vision_tower"]),
        lambda student, teacher: setattr(student.model, "vision_tower", teacher.model.vision_tower),
        # all that an output depends on: the last norm stays trainable
        lambda student, teacher: [
            part.requires_grad_(False)
            for part in (student.model.vision_tower.embeddings, student.model.vision_tower.encoder)
        ],
    ],
)
def test_a_tower_that_no_gradient_reaches_any_more(student, teacher, batch, terms, stop):
    method = SwitchKD(student, teacher, **terms).train()
    method(**batch)
    stop(student, teacher)
    name = "feature" if "feature" in terms and "switch" in terms else "switch"
    with pytest.raises(
        ValueError, match=f"the {name} term trains .* no gradient reaches that: it has been frozen since"
    ):
        method(**batch)
    method.eval()(**batch)
    with torch.no_grad():
        method.train()(**batch)


def test_without_switch_and_feature_the_tower_may_be_frozen_later(student, teacher, batch):
    method = SwitchKD(student, teacher, switch=None).train()
    freeze(student, ["vision_tower"])
    method(**batch).loss.backward()


def test_an_equal_encoder_is_known_in_the_teachers_lower_precision(student, teacher, caplog):
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    with caplog.at_level(logging.WARNING):
        SwitchKD(student, teacher.bfloat16())
    assert "begins at zero" in caplog.text


def test_equal_trainable_encoders_start_at_zero_and_move(student, teacher, batch, caplog):
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    with caplog.at_level(logging.WARNING):
        method = SwitchKD(student, teacher)
    assert [r.getMessage() for r in caplog.records if "begins at zero" in r.getMessage()]
    assert method(**batch).named["switch"].abs() < 1e-6
    with torch.no_grad():
        for parameter in student.model.vision_tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert method(**batch).named["switch"] > 1e-4


def test_an_own_divergence_and_terms_left_out(student, teacher, batch):
    def mean_gap(student_logits, teacher_logits):
        return (student_logits - teacher_logits).pow(2).mean(-1)

    terms = SwitchKD(student, teacher, align=mean_gap, switch=None)(**batch)
    gap = (answer_logits(student, batch) - answer_logits(teacher, batch)).pow(2).mean()
    assert terms.named.keys() == {"ce", "align"}
    assert terms.named["align"].item() == pytest.approx(gap.item(), rel=1e-4)


def test_text_only_batches(student, teacher, batch):
    text = {name: value[:, 16:] for name, value in batch.items() if name != "pixel_values"}
    terms = SwitchKD(student, teacher)(**text)
    terms.loss.backward()
    assert terms.named["align"] > 0
    assert terms.named["switch"].abs() < 1e-6  # nothing visual was switched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "dbld"}, "align: unknown divergence 'dbld' .did you mean dbild"),
        (
            {"switch_options": {"tau": 3}},
            "switch_options: dbild_loss has no option .'tau'.; it has temperature",
        ),
        ({"switch": None, "switch_options": {"temperature": 3}}, "switch_options is .* but switch is None"),
        ({"shared_vocab": 10**6}, "shared_vocab is 1000000; the student has"),
    ],
)
def test_bad_options_are_one_clear_error(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        SwitchKD(student, teacher, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_hidden": 48}, "features are 48 wide and the teacher's projector reads 32"),
        (
            {"patch_size": 16},
            "student has 32 px in patches of 16, 4 tokens, the teacher 32 px in patches of 8, 16",
        ),
    ],
)
def test_pairs_that_cannot_be_switched(tokenizer, teacher, change, message):
    shape = {
        "vision_hidden": 32,
        "vision_layers": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden": 32,
    } | change
    with pytest.raises(ValueError, match=message):
        SwitchKD(random_llava(tokenizer, **shape), teacher)


def test_other_vocabulary_rows_need_the_shared_number(student, teacher, batch):
    rows = student.config.text_config.vocab_size
    teacher.resize_token_embeddings(rows + 7)
    teacher.config.text_config.vocab_size = rows + 7
    with pytest.raises(ValueError, match=f"student has {rows} vocabulary rows and the teacher {rows + 7}"):
        SwitchKD(student, teacher)
    method = SwitchKD(student, teacher, shared_vocab=rows)
    with torch.no_grad():
        teacher.lm_head.weight[rows:] += 50  # padding rows never reach a loss
    z_t = answer_logits(teacher, batch)[:, :rows]
    expected = losses.dbild_loss(answer_logits(student, batch), z_t).mean()
    assert method(**batch).named["align"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_image_and_padding_ids_of_the_student_alone(student, teacher, batch):
    """The same pair and samples twice: ids that both know, and ids past the teacher's rows."""
    rows = teacher.config.text_config.vocab_size
    image, pad = student.config.image_token_id, rows + 5
    for model in (student, teacher):  # the image row comes last, so that all rows before it are shared
        model.config.image_token_id = rows - 1
    for name in ("input_ids", "labels"):
        batch[name][batch[name] == rows - 1] = 5
    batch["input_ids"][batch["input_ids"] == image] = rows - 1
    student.resize_token_embeddings(rows + 8)
    student.config.text_config.vocab_size = rows + 8

    def run():
        student.zero_grad()
        terms = SwitchKD(student, teacher, shared_vocab=rows - 1)(**batch)
        terms.loss.backward()
        gradients = {
            name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None
        }
        return terms.named, gradients

    expected, expected_gradients = run()
    student.config.image_token_id = rows + 7
    batch["input_ids"][batch["input_ids"] == rows - 1] = rows + 7
    batch["input_ids"][batch["attention_mask"] == 0] = pad
    assert (batch["input_ids"] == pad).any()
    terms, gradients = run()
    assert terms == expected
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)


def test_shared_rows_end_before_an_image_token_of_two_ids(student, teacher):
    rows = teacher.config.text_config.vocab_size
    student.config.image_token_id, teacher.config.image_token_id = 20, 30
    said = f"image token is 20 in the student and 30 in the teacher, so that {rows} leading rows .* at most 20"
    with pytest.raises(ValueError, match=said):
        SwitchKD(student, teacher)
    with pytest.raises(ValueError, match="so that 21 leading rows"):
        SwitchKD(student, teacher, shared_vocab=21)
    assert SwitchKD(student, teacher, shared_vocab=20).shared_vocab == 20


def test_heads_of_qwens_two_sizes(batch):
    """151,936 rows in the small Qwen2.5 models, 152,064 in the 7B: the tokens are the same."""
    shape = {"layers": 1, "vision_hidden": 8, "vision_layers": 1, "image_size": 32, "patch_size": 8}
    student, teacher = (random_llava(hidden=8, **shape) for _ in range(2))
    for model, rows in ((student, 151_936), (teacher, 152_064)):
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.config.text_config.vocab_size = rows
    with pytest.raises(ValueError, match="student has 151936 vocabulary rows and the teacher 152064"):
        SwitchKD(student, teacher)
    terms = SwitchKD(student, teacher, shared_vocab=151_665)(**batch)
    expected = losses.dbild_loss(*(answer_logits(model, batch)[:, :151_665] for model in (student, teacher))).mean()
    assert terms.named["align"].item() == pytest.approx(expected.item(), rel=1e-4)
