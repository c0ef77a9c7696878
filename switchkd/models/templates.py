"""Chat templates of language models: the mark of an image, a template that writes it, and what ends a turn."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from switchkd.data.conversations.tokens import special_tokens
from switchkd.models.tiny import CHAT_TEMPLATE

IMAGE_TOKEN = "<image>"
QUESTION, ANSWER = "Is there a scratch?", "A long one."
PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


def image_row(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`, or the next free one where the tokenizer does not have it."""
    row = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return len(tokenizer) if row in (None, tokenizer.unk_token_id) else row


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes `<image>` the tokenizer's image token, in a new row where it has none, and returns its id."""
    if image_row(tokenizer) == len(tokenizer):
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.image_token = IMAGE_TOKEN
    return image_row(tokenizer)


def image_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """`chat_template`, else the tokenizer's own, else ChatML with images where the tokenizer's turns are ChatML's.

    Raises ValueError where the one found does not write an image and its question.
    """
    template = chat_template or tokenizer.chat_template
    text = render(tokenizer, template, PROBE) if template else ""
    if text.count(IMAGE_TOKEN) == 1 and QUESTION in text and ANSWER in text:
        return template
    if chat_template is None and _is_chatml(tokenizer):
        return CHAT_TEMPLATE
    name = f"tokenizer {tokenizer.name_or_path!r}"
    found = f"{name} has no chat template"
    if template:
        whose = "chat_template" if chat_template else f"the chat template of {name}"
        found = f"{whose} does not write an image and its question as one {IMAGE_TOKEN} and the text"
    raise ValueError(
        f"{found}: pass a chat_template (student.chat_template or teacher.chat_template) that takes messages whose "
        'content is a list of {"type": "image"} and {"type": "text", "text": ...}'
    )


def _is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ChatML writes text as the tokenizer's own template does. The probe brings a system message, so that the
    default one that some templates write without it does not matter."""
    if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        return False
    if tokenizer.chat_template is None:
        return True
    turns = [("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER), ("user", "And now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    own, chatml = (render(tokenizer, template, messages) for template in (tokenizer.chat_template, CHAT_TEMPLATE))
    return own == chatml


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict]) -> str:
    """The messages as text; empty where the template cannot take them."""
    prompt = messages[-1]["role"] == "user"
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template is a foreign program: it may raise whatever it likes
        return ""


def end_tokens(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """What ends an answer: the language model's and the tokenizer's end tokens, and the template's end of turn, which
    base models (Qwen2.5: eos <|endoftext|>, turns end in <|im_end|>) do not count among them."""
    own = language_model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, turn_end(tokenizer, template)}
    return sorted(ends - {None})


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The special token that the template writes after an answer; None where it writes none."""
    after = render(tokenizer, template, PROBE).rpartition(ANSWER)[2]
    special = special_tokens(tokenizer)
    return next((row for row in tokenizer(after, add_special_tokens=False)["input_ids"] if row in special), None)
