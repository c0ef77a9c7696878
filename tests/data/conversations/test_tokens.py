"""What template and tokenizer write around an answer: learnt text that judging never sees, ends behind a prompt."""

import copy
import re

import pytest
import torch
from talks import TURNS, runs, talk, with_template
from tokenizers import processors
from transformers import AutoTokenizer

from switchkd.data import ConversationDataset, encode, encode_prompt
from switchkd.data.conversations.sample_check import SampleCheck
from switchkd.models import shared_vocab
from switchkd.models.tiny import CHAT_TEMPLATE, LLAMA_CHAT_TEMPLATE, tiny_llama_tokenizer

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BODY = CHAT_TEMPLATE.removesuffix(PROMPT)
# Qwen3's: the answer is written with a block of thoughts that the prompt does not open.
THINKING = BODY.replace(
    "{{ m['role'] }}\n", "{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
)
CLOSED = BODY.replace("<|im_end|>", "{% if m['role'] == 'assistant' %} [over]{% endif %}<|im_end|>")
# Mistral's turns: the question's own mark ends the prompt.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% endif %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ ' [/INST]' if m['role'] == 'user' else '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (BODY, "'<|im_start|>assistant\\n' between the prompt and the answer 'yes'"),
        (BODY + PROMPT.replace("assistant\n", ""), "'assistant\\n' between the prompt and the answer 'yes'"),
        (THINKING + PROMPT, "'<think>\\n\\n</think>\\n\\n' between the prompt and the answer 'yes'"),
        (BODY.replace("c['text'] }}", "c['text'] | upper }}") + PROMPT, "'YES<|im_end|>\\n' between the prompt"),
        (CLOSED + PROMPT, "'[over]' between the answer and '<|im_end|>'"),
    ],
    ids=["no prompt", "half a prompt", "thoughts", "another text", "before the end"],
)
def test_text_of_the_template_inside_an_answer_is_refused(processor, template, found):
    changed = with_template(processor, template)
    conversation = talk("Is there one?", "yes", "Sure?", "no")
    message = f"conversation 'c': the chat template writes {re.escape(found)}.* be learnt as part of"
    for refused in (
        lambda: encode(conversation, changed),
        lambda: SampleCheck(changed)(conversation),
        lambda: ConversationDataset([conversation], changed, max_bad_rate=0),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT_TEMPLATE, ["yes<|im_end|>", "no\n\n no<|im_end|>"]),
        (INST, ["yes<|im_end|>", "no\n\n no<|im_end|>"]),
        (INST.replace("[/INST]", "[/INST] "), ["yes<|im_end|>", "no\n\n no<|im_end|>"]),
        (CHAT_TEMPLATE.replace("<|im_end|>", "{{ '\\n' }}<|im_end|>"), ["yes\n<|im_end|>", "no\n\n no\n<|im_end|>"]),
        (CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|><|endoftext|>"), None),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant"), ["\nyes<|im_end|>", "\nno\n\n no<|im_end|>"]),
    ],
    ids=["chatml", "needs no prompt", "space", "space before the end", "two ends", "space after the prompt"],
)
def test_white_space_and_ends_around_an_answer_are_no_text(processor, template, answers):
    changed = with_template(processor, template)
    conversation = talk("Is there one?", "yes", "Sure?", "no\n\n no")
    sample = encode(conversation, changed)
    found = [changed.tokenizer.decode(run) for run in runs(sample["labels"])]
    assert found == (answers or ["yes<|im_end|><|endoftext|>", "no\n\n no<|im_end|><|endoftext|>"])
    prompt = encode_prompt(conversation.messages[:3], conversation.images, changed)["input_ids"]
    assert torch.equal(prompt, sample["input_ids"][: len(prompt)])
    assert sample["labels"][len(prompt)] != -100


def test_answers_of_several_items_and_with_an_image(processor):
    conversation = talk("Show me.", "There:", images=2)
    conversation.messages[0]["content"].pop(0)
    items = [{"type": "text", "text": " It is "}, {"type": "image"}, {"type": "text", "text": "\n here."}]
    conversation.messages[1]["content"][:] = items
    ids = encode(conversation, processor)["labels"]
    assert processor.tokenizer.decode(ids[ids != -100]) == " It is \n here.<|im_end|>"


def llama_with_an_end(folder):
    """A Llama tokenizer with add_eos_token, as some fine-tuned ones are saved."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


ENDS = {
    "start and end": "<|im_start|> $A <|im_end|>",
    "end alone": "$A <|endoftext|>",
    "two ends": "$A <|im_end|> <|endoftext|>",
}


def adding(processor, single):
    """The processor with a tokenizer that adds special tokens around every text."""
    changed = copy.deepcopy(processor)
    rows = changed.tokenizer.get_vocab()
    changed.tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single, special_tokens=[(word, rows[word]) for word in single.split() if word != "$A"]
            ),
        ]
    )
    return changed


@pytest.mark.parametrize("single", ENDS.values(), ids=ENDS)
def test_what_the_tokenizer_adds_after_a_text_is_left_out(processor, single, caplog):
    changed = adding(processor, single)
    start = single.split()[:-1][:1] if single.startswith("<") else []
    begun = changed.tokenizer.convert_tokens_to_ids(start)
    conversation = talk(*TURNS, images=2)
    plain, sample = encode(conversation, processor), encode(conversation, changed)
    assert sample["input_ids"].tolist() == begun + plain["input_ids"].tolist()
    assert sample["labels"].tolist() == [-100] * len(begun) + plain["labels"].tolist()
    for messages in (conversation.messages[:3], conversation.messages[:5]):
        prompts = [encode_prompt(messages, conversation.images, each)["input_ids"] for each in (processor, changed)]
        assert prompts[1].tolist() == begun + prompts[0].tolist()
    dataset = ConversationDataset([conversation], changed)
    assert dataset.lengths == [len(sample["input_ids"])]
    assert dataset.answer_lengths == [int((sample["labels"] != -100).sum())]
    added = re.escape(single.partition("$A ")[2])
    assert len(re.findall(f"the tokenizer adds {added} after each text", caplog.text)) == 1
    assert shared_vocab(changed.tokenizer, processor.tokenizer) == len(processor.tokenizer)


def test_a_llama_tokenizer_with_an_end_of_its_own(processor, tmp_path):
    changed = copy.copy(processor)
    changed.tokenizer = llama_with_an_end(tmp_path)
    changed.image_token_id = changed.tokenizer.convert_tokens_to_ids("<image>")
    changed.chat_template = LLAMA_CHAT_TEMPLATE
    conversation = talk("Is there one?", "yes", images=1)
    sample = encode(conversation, changed)
    ids, end = sample["input_ids"].tolist(), changed.tokenizer.eos_token_id
    assert ids.count(end) == 1
    assert ids[-1] == sample["labels"][-1] == end
    prompt = encode_prompt(conversation.messages[:1], conversation.images, changed)["input_ids"].tolist()
    assert prompt == ids[: len(prompt)]
    assert end not in prompt


def test_nothing_is_said_where_a_tokenizer_adds_no_end(processor, caplog):
    ConversationDataset([talk("Q", "A")], adding(processor, "<|im_start|> $A"))
    assert "after each text" not in caplog.text
