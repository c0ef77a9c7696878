"""Chat templates, special tokens and end tokens of students assembled from text language models."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    SiglipVisionModel,
)

from switchkd.data import Conversation, encode
from switchkd.data.conversations.sample_check import SampleCheck
from switchkd.evaluation import generate_answers
from switchkd.models import assemble_llava
from switchkd.models.tiny import CHAT_TEMPLATE, tiny_text_config, tiny_tokenizer, tiny_vision_config

# Qwen2.5's, without its branches for tools.
QWEN = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
# Llama 3's: `trim` makes a string of a list.
LLAMA = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_IMAGES = LLAMA.replace(
    "message['content'] | trim",
    "((message['content'] | map(attribute='text', default='<image>')) | join) | trim",
)


def text_tokenizer(template, special, eos, bos=None):
    """A tokenizer of text alone: the package's without <image>, with its own special tokens."""
    words = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] == "<|endoftext|>"]
    gone = {"<|im_start|>": "<a>", "<|im_end|>": "<b>", "<image>": "<c>"}
    words["model"]["vocab"] = {gone.get(word, word): row for word, row in words["model"]["vocab"].items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), name_or_path="text-lm")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_special_tokens({"extra_special_tokens": special, "eos_token": eos, "pad_token": "<|endoftext|>"})
    if bos:
        tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return tokenizer


def qwen(template=QWEN, eos="<|im_end|>"):
    return text_tokenizer(template, ["<|im_start|>", "<|im_end|>", "<|box_start|>"], eos)


def llama(template=LLAMA):
    return text_tokenizer(template, LLAMA_TOKENS, "<|eot_id|>", bos="<|begin_of_text|>")


def assemble(tokenizer, chat_template=None):
    tower = SiglipVisionModel(tiny_vision_config(32, 2, image_size=32, patch_size=8))
    language_model = Qwen2ForCausalLM(tiny_text_config(tokenizer, hidden=32, layers=1))
    return assemble_llava(tower, language_model, tokenizer, chat_template=chat_template)


def two_turns():
    turns = [("Is there a scratch?", "yes"), ("Where is it?", "at the edge")]
    messages = []
    for question, answer in turns:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Conversation("two", messages, [Image.new("RGB", (40, 40))])


def test_qwens_template_becomes_chatml_with_images():
    _, processor = assemble(qwen())
    assert processor.chat_template == CHAT_TEMPLATE
    sample = encode(two_turns(), processor)
    labels = sample["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "yes<|im_end|>at the edge<|im_end|>"
    assert (sample["input_ids"] == processor.image_token_id).sum() == 16
    text = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is there a scratch?"}]
    written = [
        processor.tokenizer.apply_chat_template(text, chat_template=template, tokenize=False)
        for template in (QWEN, CHAT_TEMPLATE)
    ]
    assert written[0] == written[1]
    assert "Alibaba" not in processor.apply_chat_template(two_turns().messages, tokenize=False)


def test_a_tokenizer_with_chatml_tokens_needs_no_template():
    assert assemble(qwen(template=None))[1].chat_template == CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"tokenizer 'text-lm' has no chat template: pass a chat_template \(student\."):
        assemble(llama(template=None))


def test_a_template_that_takes_images_is_kept():
    own = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    assert assemble(qwen(template=own))[1].chat_template == own


def test_a_template_that_drops_lists_becomes_chatml():
    own = QWEN.replace("message.content +", "(message.content if message.content is string else '') +")
    assert assemble(qwen(template=own))[1].chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "other",
    [
        llama(),  # writes the list as Python shows it
        qwen(template=QWEN.replace(r"message.role + '\n'", "message.role + ': '")),  # has the tokens, not the turns
    ],
    ids=["llama", "other turns"],
)
def test_other_text_templates_ask_for_one(other):
    with pytest.raises(
        ValueError,
        match=r"the chat template of tokenizer 'text-lm' does not write an image and its question as one <image> and "
        r"the text: pass a chat_template \(student\.chat_template or teacher",
    ):
        assemble(other)


@pytest.mark.parametrize(
    "broken",
    [
        QWEN,
        CHAT_TEMPLATE.replace("<image>", "<image><image>"),
        CHAT_TEMPLATE.replace("{{ c['text'] }}", ""),
        "{{ raise_exception('no') }}",
        "{% for",
    ],
    ids=["raises", "two marks", "no text", "refuses", "no Jinja"],
)
def test_a_given_template_must_take_images(broken):
    with pytest.raises(ValueError, match="^chat_template does not write an image and its question as one <image>"):
        assemble(qwen(), chat_template=broken)


def test_a_given_template_is_used(tmp_path):
    model, processor = assemble(llama(), chat_template=LLAMA_IMAGES)
    sample = encode(two_turns(), processor)
    labels = sample["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "yes<|eot_id|>at the edge<|eot_id|>"
    ids = sample["input_ids"].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert processor.tokenizer.convert_tokens_to_ids("<|eot_id|>") in ends(model)
    processor.save_pretrained(tmp_path)
    for kept in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert kept.chat_template == kept.tokenizer.chat_template == LLAMA_IMAGES


def test_special_tokens_stay_special(tmp_path):
    tokenizer = qwen(eos="<|endoftext|>")
    before = tokenizer.all_special_tokens
    _, processor = assemble(tokenizer)
    processor.save_pretrained(tmp_path)
    for kept in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert set(kept.tokenizer.all_special_tokens) == {*before, "<image>"}
        row = kept.tokenizer("yes<|im_end|>")["input_ids"]
        assert kept.tokenizer.decode(row, skip_special_tokens=True) == "yes"


def ends(model):
    own = model.generation_config.eos_token_id
    return own if isinstance(own, list) else [own]


class Writes(LogitsProcessor):
    """Makes `token` the only one that can be written."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def test_generate_stops_at_the_end_of_turn_of_a_base_model(tmp_path):
    tokenizer = qwen(eos="<|endoftext|>")
    model, processor = assemble(tokenizer)
    names = [("<|endoftext|>", 1), ("<|im_end|>", 1), ("<|im_start|>", 5)]
    assert sorted(ends(model)) == sorted(tokenizer.convert_tokens_to_ids(name) for name, _ in names[:2])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert ends(reloaded) == ends(model)
    prompt = tokenizer("yes", return_tensors="pt")
    for stock in (model, reloaded):
        for name, length in names:
            writes = LogitsProcessorList([Writes(tokenizer.convert_tokens_to_ids(name))])
            row = stock.generate(**prompt, logits_processor=writes, do_sample=False, max_new_tokens=5)
            assert row.shape[1] - prompt["input_ids"].shape[1] == length, name


def test_one_end_token_stays_one_number():
    tokenizer = qwen()
    assert assemble(tokenizer)[0].generation_config.eos_token_id == tokenizer.eos_token_id


# Their end of turn is special in the tokenizer's file, although no role names it.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = PHI.replace("'<|' + m['role'] + '|>\n'", "'<start_of_turn>' + m['role'] + '\n'")
GEMMA = GEMMA.replace("<|end|>", "<end_of_turn>").replace("<|assistant|>", "<start_of_turn>assistant")
UNNAMED = {  # template, special tokens that it writes, whether they take the white space after them, end of turn
    "phi3": (PHI, ["<|user|>", "<|assistant|>", "<|end|>"], True, "<|end|>"),
    "phi4": (PHI, ["<|user|>", "<|assistant|>", "<|end|>"], False, "<|end|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], False, "<end_of_turn>"),
}


@pytest.mark.parametrize("kind", UNNAMED)
def test_an_end_of_turn_that_stands_only_among_the_added_tokens(tmp_path, kind):
    template, special, takes_space, end = UNNAMED[kind]
    tokenizer = text_tokenizer(None, [], "<|endoftext|>")
    tokenizer.add_tokens([AddedToken(token, special=True, rstrip=takes_space) for token in special])
    tokenizer.save_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert end not in tokenizer.all_special_tokens
    model, processor = assemble(tokenizer, template)
    conversation = two_turns()
    sample = encode(conversation, processor)
    answers = processor.tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert answers.replace("\n", "") == f"yes{end}at the edge{end}"
    trained = tokenizer.convert_tokens_to_ids(end)
    assert trained in ends(model)
    assert SampleCheck(processor)(conversation).answer_length == int((sample["labels"] != -100).sum())

    processor.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "whole")
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    with torch.no_grad():  # whatever it reads, it writes the end of turn next
        reloaded.lm_head.weight.zero_()
        reloaded.model.language_model.norm.weight.zero_()
        reloaded.lm_head = torch.nn.Linear(32, reloaded.lm_head.out_features)
        reloaded.lm_head.bias.zero_()[trained] = 9
    (answer,) = generate_answers(reloaded, AutoProcessor.from_pretrained(tmp_path / "whole"), [conversation])
    assert (answer.text, answer.probabilities) == ("", ())
