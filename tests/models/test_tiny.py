"""The offline pair: its tokenizer, and the weights that the package ships."""

from __future__ import annotations

import json
import re

import pytest
from safetensors import safe_open
from transformers import SiglipVisionModel

from switchkd.data import to_conversations
from switchkd.data.conversations.turns import join_turns
from switchkd.data.steel import CLASSES, render_steel
from switchkd.evaluation import generate_answers, score_answers
from switchkd.models import load_llava
from switchkd.models.tiny import (
    TEACHER,
    TEACHER_SHAPE,
    VISION_TOWER,
    WEIGHTS,
    tiny_processor,
    tiny_tokenizer,
    tiny_vision_config,
)

# ---- The tokenizer


def test_two_builds_are_equal():
    first, second = tiny_tokenizer(), tiny_tokenizer()
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_digits_are_single_tokens(tokenizer):
    for text, rest in (("1000", 0), ("[250, 999]", 3)):
        pieces = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
        assert [piece for piece in pieces if any(map(str.isdigit, piece))] == [c for c in text if c.isdigit()]
        assert len(pieces) == sum(map(str.isdigit, text)) + rest


def test_special_tokens_are_single_and_apart(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    assert [tokenizer(name)["input_ids"] for name in names] == [[0], [1], [2], [3]]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.image_token) == (names[0], names[2], names[3])


def test_questions_and_answers_read_back(tokenizer):
    conversations = list(to_conversations(render_steel(50, seed=4), CLASSES))
    assert len(conversations) == 200
    for each in conversations:
        for text in (each.question, each.answer):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    longest = max(len(tokenizer(each.answer)["input_ids"]) for each in conversations)
    assert longest < 128  # judge.max_new_tokens
    assert tokenizer.decode(tokenizer("Größe 12 µm, 错")["input_ids"]) == "Größe 12 µm, 错"  # bytes: nothing is unknown


def test_the_template_writes_an_image_once():
    processor = tiny_processor()
    images = render_steel(1, seed=4)
    (conversation,) = join_turns(to_conversations(images, CLASSES))
    text = processor.apply_chat_template(conversation.messages)
    assert text.startswith("<|im_start|>user\n<image>")
    assert text.count("<image>") == 1
    assert text.count("<|im_start|>assistant\n") == text.count("<|im_start|>user\n") == 4
    assert text.endswith("<|im_end|>\n")
    prompt = processor.apply_chat_template(conversation.messages[:1], add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    encoded = processor(text=[text], images=[images[0].image], return_tensors="pt")
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 36
    assert encoded["pixel_values"].shape == (1, 3, 96, 96)


# ---- The shipped weights


def files():
    return sorted(path for path in WEIGHTS.rglob("*") if path.is_file())


def test_the_shipped_weights_are_small_and_safetensors():
    assert {path.suffix for path in files()} == {".json", ".jinja", ".safetensors"}
    assert {path.parent for path in files() if path.suffix == ".safetensors"} == {TEACHER, VISION_TOWER}
    assert sum(path.stat().st_size for path in files()) <= 4_000_000
    for path in files():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_shipped_teacher_is_the_tiny_one():
    teacher, processor = load_llava(TEACHER)
    tiny = tiny_processor()
    assert processor.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert processor.chat_template == tiny.chat_template
    assert processor.image_processor.to_dict() == tiny.image_processor.to_dict()
    text = teacher.config.text_config
    assert (text.hidden_size, text.num_hidden_layers) == (TEACHER_SHAPE["hidden"], TEACHER_SHAPE["layers"])
    assert text.vocab_size == len(tiny.tokenizer)
    assert teacher.generation_config.eos_token_id == tiny.tokenizer.eos_token_id


def test_the_shipped_tower_starts_apart_from_the_teachers():
    tower = SiglipVisionModel.from_pretrained(VISION_TOWER)
    teacher, _ = load_llava(TEACHER)
    own, other = tower.state_dict(), teacher.model.vision_tower.state_dict()
    assert {name: weight.shape for name, weight in own.items()} == {name: w.shape for name, w in other.items()}
    assert tower.config.hidden_size == tiny_vision_config().hidden_size
    moved = (own["encoder.layers.0.mlp.fc1.weight"].float() - other["encoder.layers.0.mlp.fc1.weight"]).abs().max()
    assert moved > 1e-3  # the teacher was trained on from it: the switch term does not begin at zero


def test_the_log_says_how_they_were_made():
    log = json.loads((WEIGHTS / "log.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", log["commit"])
    assert isinstance(log["seed"], int)
    assert {"machine", "images", "tower_steps", "teacher_steps", "seconds"} <= log.keys()
    assert log["towers"]["shipped"]["patch_f1"] < 0.6 < log["towers"]["teacher's before its training"]["patch_f1"]
    assert log["teacher"]["scores"]["average"] > 0.9
    assert log["teacher"]["scores"]["locate"]["ap50"] > 0.1


@pytest.mark.slow
def test_the_shipped_teacher_sees_and_scores_what_the_log_says():
    said = json.loads((WEIGHTS / "log.json").read_text())["teacher"]["scores"]
    teacher, processor = load_llava(TEACHER)
    questions = list(to_conversations(render_steel(200, seed=20_011), CLASSES, seed=5))
    options = {"batch_size": 64, "max_new_tokens": 128, "progress": False}
    seeing = score_answers(questions, generate_answers(teacher, processor, questions, **options))
    assert seeing["average"] == pytest.approx(said["average"], abs=0.05)
    assert seeing["locate"]["f1"] == pytest.approx(said["locate"]["f1"], abs=0.1)
    assert seeing["locate"]["malformed"] < 0.01
    blind = score_answers(questions, generate_answers(teacher, processor, questions, **options, blank_image=True))
    chance = sum(blind["majority"].values()) / len(blind["majority"])
    assert blind["average"] == pytest.approx(chance, abs=0.08)
    assert blind["locate"]["ap50"] < 0.02
