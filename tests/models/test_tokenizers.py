"""Tokenizers of the Llama kind: the package's tiny one, and one that sentencepiece trained."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionModel

from switchkd.data import Conversation, encode
from switchkd.data.conversations.encoding import encode_prompt
from switchkd.models import shared_vocab
from switchkd.models.config import StudentConfig
from switchkd.models.students import build_student
from switchkd.models.tiny import LLAMA_CHAT_TEMPLATE, tiny_llama_tokenizer, tiny_vision_config

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TURNS = [
    ("Is there a scratch?", "yes"),
    ("Where?", '[{"label": "patches", "bbox": [0, 12, 700, 1000]}]'),
    ("In words?", "Größe 3 µm,\nlinks  oben"),
]


def tiny_llama(folder):
    tiny_llama_tokenizer().save_pretrained(folder)


def sentencepiece_model(folder):
    """As Llama 2's folder without its tokenizer.json."""
    text = [f"USER: {question} ASSISTANT: {answer}" for question, answer in TURNS] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": LLAMA_CHAT_TEMPLATE}))


@pytest.fixture(params=[tiny_llama, sentencepiece_model])
def processor(request, tmp_path):
    request.param(tmp_path / "lm")
    rows = len(AutoTokenizer.from_pretrained(tmp_path / "lm"))
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=rows)).save_pretrained(tmp_path / "lm")
    SiglipVisionModel(tiny_vision_config(16, 2, image_size=32, patch_size=8)).save_pretrained(tmp_path / "tower")
    return build_student(StudentConfig(vision_tower=str(tmp_path / "tower"), language_model=str(tmp_path / "lm")))[1]


def talk(turns):
    messages = []
    for question, answer in turns:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Conversation("talk", messages, [Image.new("RGB", (40, 40))])


def test_labels_are_the_answers_and_their_ends(processor):
    sample = encode(talk(TURNS), processor)
    tokenizer, ids, labels = processor.tokenizer, sample["input_ids"].tolist(), sample["labels"].tolist()
    spans, inside = [], False
    for label in labels:
        if label != -100 and not inside:
            spans.append([])
        inside = label != -100
        if inside:
            spans[-1].append(label)
    assert [tokenizer.decode(span).strip() for span in spans] == [f"{answer}</s>" for _, answer in TURNS]
    assert all(span.count(tokenizer.eos_token_id) == 1 for span in spans)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(processor.image_token_id) == 16
    assert tokenizer.unk_token_id not in ids


def test_a_prompt_is_the_start_of_its_training_sample(processor):
    conversation = talk(TURNS)
    sample = encode(conversation, processor)
    prompt = encode_prompt(conversation.messages[:3], conversation.images, processor)["input_ids"]
    assert prompt.equal(sample["input_ids"][: len(prompt)])
    assert sample["labels"][len(prompt)] != -100
    assert sample["labels"][len(prompt) - 1] == -100


def test_bytes_and_spaces_read_back(processor):
    for _, answer in TURNS:
        ids = processor.tokenizer(answer)["input_ids"]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_it_shares_its_rows_with_itself(processor):
    assert shared_vocab(processor.tokenizer, processor.tokenizer) == len(processor.tokenizer)
