import random

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlavaForConditionalGeneration

from switchkd.data.conversations.conversation import Conversation
from switchkd.data.conversations.encoding import encode, encode_prompt
from switchkd.evaluation import Answer, generate_answers
from switchkd.models.tiny import random_llava, tiny_processor

SIZE = 32
GENERATE = LlavaForConditionalGeneration.generate


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(image_size=SIZE)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    model = random_llava(processor.tokenizer, image_size=SIZE, vision_hidden=32, vision_layers=1)
    with torch.no_grad():  # far from a fresh model's near-even logits, so that answers differ and do not tie
        for name, weight in model.named_parameters():
            if "embed_tokens" not in name and weight.dim() > 1:
                weight.mul_(6)
        model.model.language_model.norm.weight.mul_(20)
    return model


def picture(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (SIZE, SIZE), random.Random(seed).randbytes(SIZE * SIZE * 3))


def ask(id_: str, question: str, *pictures, kind: str = "") -> Conversation:
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "the reference"}]},
    ]
    return Conversation(id_, messages, list(pictures), kind)


@pytest.fixture(scope="module")
def conversations():
    """Kinds, lengths and picture counts mixed, in an order that no sorting keeps."""
    words = ["is", "there", "a", "scratch", "in", "the", "image", "or", "a", "patch"]
    made = []
    for n, images in enumerate([1, 0, 2, 1, 1, 0, 1, 2, 1]):
        question = " ".join(words[: 1 + (n * 5) % 9])
        made.append(ask(str(n), question, *map(picture, range(n, n + images)), kind="ba"[n % 2]))
    return made


def answer(model, processor, conversations, **options) -> list[Answer]:
    return generate_answers(model, processor, conversations, progress=False, **{"max_new_tokens": 12} | options)


def test_a_batch_answers_as_one_by_one_and_in_order(model, processor, conversations):
    together = answer(model, processor, conversations, batch_size=4)
    alone = [answer(model, processor, [conversation])[0] for conversation in conversations]
    assert len({a.text for a in alone}) > 5
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.spans for a in together] == [a.spans for a in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)


def test_probabilities_and_tokens_are_those_of_a_plain_forward(model, processor, conversations):
    answers = answer(model, processor, conversations, batch_size=9)
    model.eval()
    for conversation, written in zip(conversations, answers, strict=True):
        encoded = encode_prompt(conversation.messages[:1], conversation.images, processor)
        ids = encoded["input_ids"][None]
        pixels = {"pixel_values": encoded["pixel_values"]} if conversation.images else {}
        expected, tokens = [], []
        for _ in range(12):
            with torch.no_grad():
                probabilities = model(input_ids=ids, **pixels).logits[0, -1].softmax(-1)
            token = probabilities.argmax()
            if token == processor.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
            tokens.append(int(token))
            expected.append(float(probabilities[token]))
        assert 0.05 < min(expected) < max(expected) < 1
        assert written.probabilities == pytest.approx(expected, abs=1e-4)
        assert written.text == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_answer_ends_before_the_end_token(model, processor, conversations):
    """A token that a model wrote, made an end token: the answer stops there."""
    (full,) = answer(model, processor, conversations[:1])
    assert len(full.probabilities) == 12
    written = [processor.tokenizer.encode(full.text[start:end], add_special_tokens=False) for start, end in full.spans]
    token = [ids[0] for ids in written if len(ids) == 1][-1]  # a token can be a part of a character, which has several
    stored = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=token)
    try:
        (cut,) = answer(model, processor, conversations[:1])
    finally:
        model.generation_config = stored
    assert len(cut.probabilities) < 12
    assert full.text.startswith(cut.text)
    assert cut.text != full.text


def test_settings_of_the_checkpoint_do_not_change_greedy_answers(model, processor, conversations):
    plain = answer(model, processor, conversations)
    stored = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=5.0,
        min_new_tokens=3,
        eos_token_id=stored.eos_token_id,
    )
    recommended = model.generation_config
    try:
        assert answer(model, processor, conversations) == plain
        assert model.generation_config is recommended
    finally:
        model.generation_config = stored


def test_spans_cover_the_text_token_by_token(model, processor, conversations):
    for written in answer(model, processor, conversations, max_new_tokens=24):
        assert len(written.spans) == len(written.probabilities)
        assert "".join(written.text[first:last] for first, last in written.spans) == written.text


def test_the_spans_of_a_character_of_several_tokens(processor):
    from switchkd.evaluation.generate import _answer

    tokens = processor.tokenizer.encode("a\u00e9\u20ac yes", add_special_tokens=False)
    end = processor.tokenizer.eos_token_id
    written = _answer(processor.tokenizer, [*tokens, end, 0], [0.5] * (len(tokens) + 2), [end])
    assert written.text == "a\u00e9\u20ac yes"
    assert len(written.spans) == len(tokens) > 5
    assert [written.text[first:last] for first, last in written.spans][:6] == [
        "a",
        "",
        "\u00e9",
        "",
        "",
        "\u20ac",
    ]


def test_a_blank_image_hides_the_picture_and_nothing_else(model, processor):
    pictures = [picture(1), picture(2), Image.new("RGB", (SIZE, SIZE), (250, 10, 10))]
    seen = [ask(str(n), "Which defect is in the image?", p) for n, p in enumerate(pictures)]
    open_eyes = answer(model, processor, seen)
    blind = answer(model, processor, seen, blank_image=True)
    assert len({a.probabilities for a in open_eyes}) == 3
    assert blind[0].text == blind[1].text == blind[2].text
    assert blind[0].probabilities == pytest.approx(blind[1].probabilities, abs=1e-5)
    grey = answer(
        model, processor, [ask("grey", "Which defect is in the image?", Image.new("RGB", (7, 9), (128,) * 3))]
    )
    assert blind[0].probabilities == pytest.approx(grey[0].probabilities, abs=1e-5)
    words = [ask("words", "Which defect is in the image?")]
    assert answer(model, processor, words, blank_image=True) == answer(model, processor, words)


def test_a_blank_image_keeps_the_size(model, processor, tmp_path, monkeypatch):
    path = tmp_path / "strip.png"
    Image.new("L", (40, 20), 9).save(path)
    given = []

    def spy(messages, images, processor):
        given.extend(images)
        return encode_prompt(messages, images, processor)

    monkeypatch.setattr("switchkd.evaluation.generate.encode_prompt", spy)
    answer(model, processor, [ask("0", "a", path)])
    answer(model, processor, [ask("0", "a", path)], blank_image=True)
    assert given[0] == path
    assert (given[1].size, given[1].getcolors()) == ((40, 20), [(800, (128, 128, 128))])


def test_the_last_question_is_answered_after_the_earlier_turns(model, processor, monkeypatch):
    first, second = ask("0", "Is there a scratch?", picture(1)), ask("0", "And a patch?", picture(2))
    third = ask("0", "Where?")
    both = Conversation("0", first.messages + second.messages, [picture(1), picture(2)])
    open_end = Conversation("0", both.messages + third.messages[:1], both.images)
    given = []

    def spy(messages, images, processor):
        given.append((messages, len(images)))
        return encode_prompt(messages, images, processor)

    monkeypatch.setattr("switchkd.evaluation.generate.encode_prompt", spy)
    answer(model, processor, [first, both, open_end], batch_size=1)
    assert given == [(first.messages[:1], 1), (both.messages[:3], 2), (open_end.messages, 2)]


def test_the_length_limit_may_differ_by_kind(model, processor, conversations):
    answers = answer(model, processor, conversations, max_new_tokens={"a": 2, "b": 5})
    assert max(len(a.spans) for a, c in zip(answers, conversations, strict=True) if c.kind == "a") == 2
    assert max(len(a.spans) for a, c in zip(answers, conversations, strict=True) if c.kind == "b") == 5


def test_modes_are_restored_and_answers_are_made_in_eval_mode(model, processor, conversations):
    plain = answer(model, processor, conversations)
    dropout = model.model.language_model.layers[0].self_attn
    dropout.attention_dropout = 0.9
    model.train()
    model.model.vision_tower.eval()  # a frozen tower inside a model in training
    try:
        assert answer(model, processor, conversations) == plain
        assert model.training
        assert model.model.language_model.training
        assert not any(module.training for module in model.model.vision_tower.modules())
        with pytest.raises(FileNotFoundError):
            answer(model, processor, [ask("0", "a", "missing.png")], blank_image=True)
        assert model.training
    finally:
        dropout.attention_dropout = 0.0
        model.eval()


def test_no_questions_no_answers(model, processor):
    assert answer(model, processor, []) == []


def test_errors(model, processor, conversations):
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer(model, processor, conversations, batch_size=0)
    with pytest.raises(ValueError, match=r"max_new_tokens names \['a'\], but conversation '0' is of kind 'b'"):
        answer(model, processor, conversations, max_new_tokens={"a": 1})
    with pytest.raises(ValueError, match="conversation 'x' has no user message"):
        answer(model, processor, [Conversation("x", conversations[0].messages[1:], [])])
    stored = model.generation_config, processor.tokenizer.eos_token, processor.chat_template
    model.generation_config, processor.tokenizer.eos_token = GenerationConfig(), None
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "")
    try:
        with pytest.raises(ValueError, match=r"neither .* names an end token"):
            answer(model, processor, conversations)
    finally:
        model.generation_config, processor.tokenizer.eos_token, processor.chat_template = stored


@pytest.mark.parametrize("named", [[], ["<|endoftext|>"]])
def test_what_is_trained_to_end_an_answer_ends_it(model, processor, conversations, named, monkeypatch):
    """Although neither the generation config nor the tokenizer names it: of the template alone."""
    tokenizer = processor.tokenizer
    stored = model.generation_config, tokenizer.eos_token
    rows = tokenizer.convert_tokens_to_ids(named)
    model.generation_config, tokenizer.eos_token = GenerationConfig(eos_token_id=rows or None), None
    sample = encode(conversations[0], processor)
    trained = int(sample["labels"][sample["labels"] != -100][-1])
    asked = []
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(given) or GENERATE(model, **given))
    try:
        assert len(answer(model, processor, conversations[:1])) == 1
    finally:
        model.generation_config, tokenizer.eos_token = stored
    assert asked[0]["generation_config"].eos_token_id == sorted([*rows, trained])
    assert tokenizer.convert_ids_to_tokens(trained) == "<|im_end|>"
