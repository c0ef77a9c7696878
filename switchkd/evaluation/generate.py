"""Batched greedy answers of a vision-language model, with the probability of every token it wrote."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from switchkd.data.conversations.conversation import Conversation, message_text
from switchkd.data.conversations.encoding import Collator, encode_prompt
from switchkd.data.images import load_image
from switchkd.models.templates import end_tokens

# One grey for every model, so that teacher and student are blinded by the same picture.
BLANK = (128, 128, 128)


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one question, up to and without its end token.

    text: as decoded, without special tokens and not stripped.
    spans: for each token, the (start, end) characters of `text` that it made; empty for a special token and
        for a token that is only a part of a character (the token that completes the character holds it).
    probabilities: for each token, the softmax of its step's logits at the token, in 0..1.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    probabilities: tuple[float, ...]


class _ChosenProbabilities(LogitsProcessor):
    """Keeps the probability of the token that greedy decoding takes: [batch] a step, not [batch, vocab]."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores_f32 = scores.float()
        self.steps.append((scores_f32.amax(-1) - scores_f32.logsumexp(-1)).exp())
        return scores


def last_question(conversation: Conversation) -> int:
    """The index of the conversation's last user message. Raises ValueError where there is none."""
    for index in range(len(conversation.messages) - 1, -1, -1):
        if conversation.messages[index]["role"] == "user":
            return index
    raise ValueError(f"conversation {conversation.id!r} has no user message: there is no question to answer")


def generate_answers(
    model,
    processor,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 64,
    max_new_tokens: int | Mapping[str, int] = 512,
    blank_image: bool = False,
    progress: bool = True,
) -> list[Answer]:
    """Answers the last question of each conversation, by plain greedy decoding, in order.

    The prompt is every message up to the last user message; earlier answers in it are the reference ones.
    Sampling, penalties and length limits of the checkpoint's generation config are not used, so that the
    scores of two models compare; its end tokens are, together with the tokenizer's and the chat template's end of
    turn, with which every answer was trained to end.
    Questions of one kind are answered together, ordered by the length of their prompts, so that short
    answers do not wait for long ones.

    max_new_tokens: tokens an answer may have: a number, or {kind: number} ({"exists": 8, "locate": 512}).
    blank_image: the blind control: each picture becomes an even grey one of its size (ours).

    The train or eval mode of each module of the model is afterwards what it was before.
    Raises ValueError for a conversation without a user message, a kind that `max_new_tokens` does not name,
    a batch size below 1, or a model and tokenizer without an end token.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: answer at least 1 question at a time")
    jobs = []
    for index, conversation in enumerate(conversations):
        if isinstance(max_new_tokens, Mapping) and conversation.kind not in max_new_tokens:
            raise ValueError(
                f"max_new_tokens names {sorted(max_new_tokens)}, but conversation {conversation.id!r} is of"
                f" kind {conversation.kind!r}: add that kind, or give one number for all"
            )
        prompt = conversation.messages[: last_question(conversation) + 1]
        characters = sum(len(message_text(message)) for message in prompt)
        jobs.append((conversation.kind, len(conversation.images), characters, index, prompt))
    # The true lengths would need every picture opened twice; images, then characters, order them as well.
    jobs.sort(key=lambda job: job[:4])

    tokenizer = processor.tokenizer
    ends = _end_tokens(model, processor)
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    collate = Collator(pad_token, padding_side="left")
    answers: list[Answer | None] = [None] * len(jobs)
    modes = [(module, module.training) for module in model.modules()]
    own_config = model.generation_config
    bar = tqdm(total=len(jobs), desc="answers", unit="question", disable=not progress)
    try:
        model.eval()
        for kind, group in itertools.groupby(jobs, key=lambda job: job[0]):
            limit = max_new_tokens[kind] if isinstance(max_new_tokens, Mapping) else max_new_tokens
            # generate() fills what a config leaves open from the model's own: put that aside as well
            model.generation_config = GenerationConfig(
                do_sample=False,
                use_cache=True,
                max_new_tokens=limit,
                eos_token_id=ends,
                pad_token_id=pad_token,
            )
            for batch in _batches(list(group), batch_size):
                encoded = []
                for _, _, _, index, prompt in batch:
                    pictures = conversations[index].images
                    if blank_image:
                        pictures = [_blank(picture) for picture in pictures]
                    encoded.append(encode_prompt(prompt, pictures, processor))
                written = _decode_batch(model, tokenizer, collate(encoded), ends)
                for job, answer in zip(batch, written, strict=True):
                    answers[job[3]] = answer
                bar.update(len(batch))
    finally:
        bar.close()
        model.generation_config = own_config
        for module, training in modes:
            module.training = training
    return answers


def _batches(jobs: list, size: int):
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _end_tokens(model, processor) -> list[int]:
    ends = end_tokens(model, processor.tokenizer, processor.chat_template)
    if not ends:
        raise ValueError(
            "neither the model's generation config nor the tokenizer names an end token (eos_token_id), so no"
            " answer would end: set tokenizer.eos_token to the chat template's end of turn"
        )
    return ends


def _blank(picture) -> Image.Image:
    return Image.new("RGB", load_image(picture).size, BLANK)


def _decode_batch(model, tokenizer, batch: dict, stops: list[int]) -> list[Answer]:
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if "pixel_values" in batch:
        inputs["pixel_values"] = batch["pixel_values"].to(model.device, model.dtype)
    chosen = _ChosenProbabilities()
    sequences = model.generate(
        **inputs, generation_config=model.generation_config, logits_processor=LogitsProcessorList([chosen])
    )
    tokens = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    probabilities = torch.stack(chosen.steps, dim=1).tolist()
    return [
        _answer(tokenizer, row, row_probabilities, stops)
        for row, row_probabilities in zip(tokens, probabilities, strict=True)
    ]


def _answer(tokenizer, tokens: list[int], probabilities: list[float], stops: list[int]) -> Answer:
    length = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))

    def text_of(count: int) -> str:
        return tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text = text_of(length)
    ends = [0]
    # Decoding every prefix is right for byte-level and sentencepiece tokenizers alike.
    for count in range(1, length + 1):
        prefix = text_of(count)
        if not text.startswith(prefix):  # it ends inside a character, shown as replacement marks
            prefix = prefix.rstrip("\ufffd")
        ends.append(max(ends[-1], len(prefix)))
    return Answer(text, tuple(itertools.pairwise(ends)), tuple(probabilities[:length]))
