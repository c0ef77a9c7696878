"""The offline pair: tokenizers made from the package's own text, small configs, and the shipped weights."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from switchkd.data.conversations import instruct
from switchkd.data.steel import CLASSES

WEIGHTS = Path(__file__).parent / "weights"
TEACHER = WEIGHTS / "teacher"
VISION_TOWER = WEIGHTS / "vision_tower"

TEACHER_SHAPE = {"hidden": 96, "layers": 3}  # of its language model
STUDENT_SHAPE = {"hidden": 64, "layers": 2}

IMAGE_SIZE = 96
PATCH_SIZE = 16
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# LLaVA 1.5's turns. An answer begins with its space and ends in </s>.
LLAMA_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %} {% endif %}"
    "{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 rows learnt from the questions and answers of `switchkd.data.conversations.instruct`.

    Digits are single tokens, as in Qwen2.5. The same rows in the same order on every machine.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|[^\dA-Za-z]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the Llama kind, learnt from the same text: BPE over `▁` for spaces, and bytes where a character
    has no row; `<unk>`, `<s>` before each text, `</s>`, no `<image>` and no padding token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # The trainer keeps the bytes' rows only as special tokens; they are words, which decoding must not skip.
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = written["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=LLAMA_CHAT_TEMPLATE,
    )


def _corpus() -> list[str]:
    names = [instruct.shown(name) for name in CLASSES]
    phrases = [
        *instruct.EXISTS,
        *instruct.CLASSIFY,
        *instruct.COUNT,
        *instruct.LOCATE_ALL,
        *instruct.LOCATE_ONE,
    ]
    lines = [phrase.format(name=name) for phrase in phrases for name in names]
    lines += [json.dumps([{"label": name, "bbox": [0, 250, 500, 1000]}] * 2) for name in names]
    lines += [f"{a}, {b}" for a in names for b in names]
    lines += ["system\n", "user\n", "assistant\n", "yes", "no", instruct.NONE]
    return lines * 2


def tiny_processor(image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE) -> LlavaProcessor:
    """Processor of the offline pair: square pictures, SigLIP normalisation, (image_size / patch_size)^2 tokens."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=tiny_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_vision_config(
    hidden: int = 96, layers: int = 4, image_size: int = IMAGE_SIZE, patch_size: int = PATCH_SIZE
) -> SiglipVisionConfig:
    """A SigLIP tower without its pooling head."""
    return SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )


def tiny_text_config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen2Config:
    """A Qwen2 language model over `tokenizer`'s rows, with tied embeddings as in the small Qwen2.5 models."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_llava(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    hidden: int = 64,
    layers: int = 2,
    vision_hidden: int = 96,
    vision_layers: int = 4,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
) -> LlavaForConditionalGeneration:
    """A randomly started LLaVA of the offline pair's form; seed torch before. Reads the tower's last layer."""
    tokenizer = tokenizer or tiny_tokenizer()
    text = tiny_text_config(tokenizer, hidden, layers)
    config = LlavaConfig(
        vision_config=tiny_vision_config(vision_hidden, vision_layers, image_size, patch_size),
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)
