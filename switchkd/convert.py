"""A checkpoint of TinyLLaVA_Factory as a stock LLaVA folder that plain transformers loads.

The layout, the prompts and the treatment of pictures are facts of github.com/TinyLLaVA/TinyLLaVA_Factory
(Apache-2.0) up to its rewrite of 2026. Only JSON, tokenizer files and safetensors of the folder are read.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from switchkd.data import Conversation, encode
from switchkd.models.llava import make_processor
from switchkd.models.pathway import pathway_of
from switchkd.models.templates import PROBE, add_image_token
from switchkd.models.towers import TOWERS, tower_kind
from switchkd.training.checkpoints import put_in_place

# One prompt for every language model, but for the token that ends an answer. The generation prompt ends in a colon:
# the space after it is part of the answer's first token.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% set parts = [{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content'] %}"
    "{% set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{% set images = parts | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% if loop.first %}{% if m['role'] == 'system' %}{{ text }}{% else %}A chat between a curious user and an "
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions.{% endif %}{{ ' ' }}{% endif %}"
    "{% if m['role'] == 'user' %}USER: "
    "{{ (('<image>\n' * images) ~ (text | trim)) | trim if images else text }}{{ ' ' }}"
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ text }}END_OF_TURN"
    "{% elif not loop.first %}{{ raise_exception('a system message must come first') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# By type of language model: the template of TinyLLaVA's training scripts, and its end of turn.
TURN_ENDS = {
    "qwen2": ("qwen2_base", "<|endoftext|>"),
    "llama": ("llama", "</s>"),
    "stablelm": ("phi", "<|endoftext|>"),
}
REFUSED = {
    "phi": "its head has a bias, which the stock LLaVA class lacks",
    "gemma": "it scales visual tokens, which the stock LLaVA class does not",
}
PARTS = {"text_config": tuple(TURN_ENDS), "vision_config": tuple(TOWERS)}
# "patch" drops the first token of any tower: CLIP's class token, but of SigLIP, which has none, the first patch
# (728 of 729 are left; TinyLLaVA_Factory's issue 203). So does the stock class's "default", and so was it trained.
STRATEGIES = {"patch": "default", "cls_patch": "full"}
RENAMED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower._vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower._vision_tower.": "model.vision_tower.",
    "connector._connector.0.": "model.multi_modal_projector.linear_1.",
    "connector._connector.2.": "model.multi_modal_projector.linear_2.",
}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# Settings that decide what a part computes, yet show in no tensor's shape.
SHAPELESS = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_theta")


def convert(source: Path, target: Path, *, chat_template: str | None = None) -> None:
    """Writes the TinyLLaVA checkpoint in `source` to `target` as LlavaForConditionalGeneration with its processor.

    source: a folder with config.json, safetensors (one file or shards with their index) and tokenizer files; it is
    not changed. target: a folder that does not exist yet; it appears only when whole. Weights keep the type they are
    stored in.
    chat_template: Jinja text; left out, the template that TinyLLaVA's scripts train this language model with. The
    folder does not say which one its training took: the name is printed with what was written.

    Raises FileNotFoundError for a missing file, and ValueError for a target that exists or lies in the source, what
    the stock class cannot express (other connectors, towers and language models), a pickle, a torn file, tensors that
    are unknown, missing or of another shape than config.json says, and a template that `switchkd.data.encode` refuses.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists already: name a new folder, or remove it first")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}, which stays as it is: name a folder outside it")
    given = _tinyllava_config(source)
    files = _weight_files(source)
    config = _stock_config(given, source)
    name, template = _template(given, chat_template)
    tokenizer = _tokenizer(source, given, config)
    processor = _processor(given, config, tokenizer, template)
    ends = _end_tokens(config, processor, name)
    weights = _weights(files, config)
    if len(tokenizer) > config.text_config.vocab_size:
        _grow(weights, config, len(tokenizer))
    model = _on_no_device(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    model.config.dtype = weights[EMBEDDING].dtype
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as staging:
        staged = Path(staging) / target.name
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        put_in_place(staged, target)
    visual_tokens = pathway_of(model).visual_token_count
    tower, text = config.vision_config.model_type, config.text_config.model_type
    print(
        f"{target}: {model.num_parameters():,} parameters in {', '.join(dtypes)}; {tower}, layer "
        f"{config.vision_feature_layer}, {visual_tokens} visual tokens an image; a two-layer projector; "
        f"{text}; the chat template is {name}, answers end in {tokenizer.decode(ends[:1])!r}"
    )


def _tinyllava_config(source: Path) -> dict:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a TinyLLaVA_Factory checkpoint")
    given = _read_json(path)
    if given.get("model_type") != "tinyllava":
        raise ValueError(
            f"{path} has model_type {given.get('model_type')!r}, not 'tinyllava': nothing else is converted"
        )
    known = {
        "connector_type": ("mlp2x_gelu",),
        "vision_feature_select_strategy": tuple(STRATEGIES),
        "image_aspect_ratio": ("square", "pad", None),
    }
    for field, values in known.items():
        if given.get(field) not in values:
            raise ValueError(
                f"{path} has {field} {given.get(field)!r}: the stock LLaVA class can only express "
                f"{' and '.join(repr(value) for value in values if value)}"
            )
    if not isinstance(given.get("vision_feature_layer"), int):
        raise ValueError(
            f"{path} has vision_feature_layer {given.get('vision_feature_layer')!r}: it must be one number"
        )
    return given


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (source / name).is_file():
                raise FileNotFoundError(f"{index} lists {name}, which is not in {source}: download the folder again")
        return [source / name for name in names]
    pickles = sorted(str(path.relative_to(source)) for path in source.rglob("*.bin"))
    if pickles:
        raise ValueError(
            f"{source} holds its weights as {pickles[0]}, a pickle, which can run code when it is read: load it where "
            "it was trained and save it with save_pretrained(..., safe_serialization=True)"
        )
    raise FileNotFoundError(f"{source} holds neither model.safetensors nor {index.name}: download the folder again")


def _stock_config(given: dict, source: Path) -> LlavaConfig:
    text, vision = (_part_config(given, part, source) for part in PARTS)
    return LlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        vision_feature_layer=given["vision_feature_layer"],
        vision_feature_select_strategy=STRATEGIES[given["vision_feature_select_strategy"]],
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _part_config(given: dict, part: str, source: Path) -> PreTrainedConfig:
    """TinyLLaVA saves what differs from the defaults of the part's own class, and reads the rest from them; so does
    this, and prints it where no shape of a tensor can contradict."""
    fields = given.get(part) or {}
    kind = fields.get("model_type")
    if kind not in PARTS[part]:
        why = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise ValueError(
            f"{source / 'config.json'} has {part}.model_type {kind!r}{why}: only {', '.join(PARTS[part])} are converted"
        )
    passed_over = ("_name_or_path", "model_name_or_path", "model_name_or_path2", "auto_map", "torch_dtype", "dtype")
    config = CONFIG_MAPPING[kind](**{name: fields[name] for name in fields if name not in passed_over})
    values = config.to_dict() | (config.to_dict().get("rope_parameters") or {})
    said = fields | (fields.get("rope_parameters") or {})
    left_out = [name for name in SHAPELESS if name in values and name not in said]
    if left_out:
        print(f"{part} leaves out defaults of {kind}: {', '.join(f'{name} {values[name]}' for name in left_out)}")
    return config


def _template(given: dict, chat_template: str | None) -> tuple[str, str]:
    """The template's name and its text."""
    if chat_template is not None:
        return "the given one", chat_template
    name, end = TURN_ENDS[given["text_config"]["model_type"]]
    if name == "qwen2_base" and "instruct" in str(given.get("llm_model_name_or_path")).lower():
        name, end = "qwen2_instruct", "<|im_end|>"
    return f"TinyLLaVA's {name}", CHAT_TEMPLATE.replace("END_OF_TURN", end)


def _tokenizer(source: Path, given: dict, config: LlavaConfig) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with `<image>` in it; `config` learns its row."""
    kinds = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((source / name).is_file() for name in names) for names in kinds):
        whose = given.get("tokenizer_name_or_path") or given.get("llm_model_name_or_path") or "its language model"
        raise FileNotFoundError(
            f"{source} has no tokenizer files (tokenizer.json, tokenizer.model, or vocab.json and merges.txt): copy "
            f"those of {whose} into it"
        )
    # With the config given, config.json and its auto_map are not asked which class to take.
    tokenizer = AutoTokenizer.from_pretrained(source, config=config.text_config, trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer in {source} has {len(tokenizer)} tokens, but text_config.vocab_size is {rows}: it is not "
            "this model's tokenizer"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = given.get("pad_token") or tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    config.image_token_index = add_image_token(tokenizer)
    return tokenizer


def _processor(given: dict, config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, template: str) -> LlavaProcessor:
    """Pictures as TinyLLaVA takes them: by the tower's own processor, which stretches for SigLIP, and for CLIP scales
    and cuts out the middle; first padded to a square of the mean colour where image_aspect_ratio is "pad"."""
    vision = config.vision_config
    tower = tower_kind(vision)
    image_processor = tower.own_image_processor(vision.image_size)
    if given.get("image_aspect_ratio") == "pad":
        names = ["size", "image_mean", "image_std", *(["crop_size"] if tower.crops else [])]
        settings = {name: getattr(image_processor, name) for name in names}
        image_processor = LlavaImageProcessorPil(do_pad=True, do_center_crop=tower.crops, **settings)
    return make_processor(
        vision,
        tokenizer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template,
        image_processor=image_processor,
    )


def _end_tokens(config: LlavaConfig, processor: LlavaProcessor, name: str) -> list[int]:
    """The template's end of turn, then what else ends a text. A conversation is encoded to find it, which also checks
    that the template can be trained with."""
    messages = [*PROBE, *({**message, "content": message["content"][-1:]} for message in PROBE)]
    try:
        labels = encode(Conversation("probe", messages, [Image.new("RGB", (8, 8))]), processor)["labels"]
    except ValueError as error:
        raise ValueError(f"chat template {name} does not fit the tokenizer (chat_template): {error}") from error
    end = int(labels[labels != -100][-1])
    own = config.text_config.eos_token_id
    others = {*(own if isinstance(own, list) else [own]), processor.tokenizer.eos_token_id} - {None, end}
    return [end, *sorted(others)]


def _on_no_device(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def _weights(files: list[Path], config: LlavaConfig) -> dict[str, Tensor]:
    """Every tensor of the files under its stock name, mapped from the disk rather than copied; a tied head and
    embedding under both names."""
    expected = {name: tuple(weight.shape) for name, weight in _on_no_device(config).state_dict().items()}
    weights, unknown = {}, []
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no dict
                    stock = next(
                        (new + name.removeprefix(old) for old, new in RENAMED.items() if name.startswith(old)), None
                    )
                    if stock not in expected or stock in weights:
                        unknown.append(name)
                        continue
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if shape != expected[stock]:
                        raise ValueError(
                            f"{name} in {path} has shape {shape}, but config.json makes it {expected[stock]}: the two "
                            "are not of one checkpoint"
                        )
                    weights[stock] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error
    if config.tie_word_embeddings:
        pair = [weights[name] for name in (EMBEDDING, HEAD) if name in weights]
        if len(pair) == 2 and not torch.equal(*pair):
            raise ValueError(
                "the head and the embedding are stored with other values, but text_config.tie_word_embeddings is true: "
                "correct it in config.json"
            )
        if pair:
            weights[EMBEDDING] = weights[HEAD] = pair[0]
    missing = sorted(expected.keys() - weights.keys())
    if unknown or missing:
        raise ValueError(
            f"{files[0].parent} does not hold the tensors of a TinyLLaVA checkpoint: {len(unknown)} are unknown or "
            f"twice there {sorted(unknown)[:3]}, {len(missing)} are missing {missing[:3]}"
        )
    return weights


def _grow(weights: dict[str, Tensor], config: LlavaConfig, rows: int) -> None:
    """Rows for `<image>`, the mean of the others: its embedding is never read, and its logit stays unremarkable."""
    for name in (EMBEDDING, HEAD):
        weight = weights[name]
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        weights[name] = torch.cat([weight, mean.expand(rows - len(weight), -1)])
    config.text_config.vocab_size = rows
