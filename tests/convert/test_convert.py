"""TinyLLaVA folders of the public layout, written here from plain modules, and what `convert` makes of them."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_llava_folder import (
    LANGUAGE_MODELS,
    SYSTEM,
    TOWERS,
    TinyLlava,
    check_same_logits,
    load,
    picture,
    pictures_of,
    talk,
    text_tokenizer,
)
from torch import nn
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
)

from switchkd.convert import convert
from switchkd.data import Conversation, encode


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("strategy", ["patch", "cls_patch"])
def test_the_stock_model_computes_what_the_parts_compute(tmp_path, tower, language_model, strategy):
    tiny = TinyLlava(tower, language_model, vision_feature_select_strategy=strategy)
    convert(tiny.save(tmp_path / "tiny"), tmp_path / "stock")
    _, processor = check_same_logits(tiny, tmp_path / "stock")
    # The first token goes, whether it is a class token or, with SigLIP, a patch.
    tokens = 16 + (tower == "clip") - (strategy == "patch")
    assert (
        encode(Conversation("a", talk(), [picture()]), processor)["input_ids"] == processor.image_token_id
    ).sum() == tokens


@pytest.mark.parametrize("stored", ["both", "embedding alone", "head alone"])
def test_a_tied_head_stays_tied_however_it_is_stored(tmp_path, capsys, stored):
    tiny = TinyLlava(tied=True)
    weights = tiny.weights(head=stored != "embedding alone")
    if stored == "head alone":
        del weights["language_model.model.embed_tokens.weight"]
    convert(tiny.save(tmp_path / "tiny", weights), tmp_path / "stock")
    model, _ = check_same_logits(tiny, tmp_path / "stock")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "stock" / "model.safetensors")
    assert f" {model.num_parameters():,} parameters" in capsys.readouterr().out


def test_shards_and_keys_without_vision_model_are_read(tmp_path):
    tiny = TinyLlava(vision_feature_layer=-1)
    convert(tiny.save(tmp_path / "tiny", tiny.weights(prefix=""), shards=3), tmp_path / "stock")
    check_same_logits(tiny, tmp_path / "stock")


def test_weights_keep_their_type_and_every_value(tmp_path):
    tiny = TinyLlava(dtype=torch.bfloat16)
    source = tiny.save(tmp_path / "tiny")
    convert(source, tmp_path / "stock")
    given, written = load_file(source / "model.safetensors"), load_file(tmp_path / "stock" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    assert sorted(weight.double().sum().item() for weight in given.values()) == sorted(
        weight.double().sum().item() for weight in written.values()
    )
    assert load(tmp_path / "stock")[0].dtype == torch.bfloat16
    check_same_logits(tiny, tmp_path / "stock", atol=0.02)


def test_rows_are_added_only_where_none_is_left_for_the_image_token(tmp_path):
    rows = len(text_tokenizer("</s>"))
    for name, given, expected in (("full", rows, rows + 1), ("spare", rows + 1, rows + 1), ("many", 500, 500)):
        tiny = TinyLlava(rows=given, tied=True)
        convert(tiny.save(tmp_path / name), tmp_path / f"{name}-stock")
        model, processor = check_same_logits(tiny, tmp_path / f"{name}-stock")
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == expected
        assert model.config.text_config.vocab_size == expected
        assert model.config.image_token_id == processor.image_token_id == rows
    new = model.get_input_embeddings().weight
    assert not torch.isnan(new).any()


@pytest.mark.parametrize("tower", TOWERS)
def test_padded_pictures_are_padded_as_tinyllava_does(tmp_path, tower):
    tiny = TinyLlava(tower, image_aspect_ratio="pad")
    convert(tiny.save(tmp_path / "tiny"), tmp_path / "stock")
    _, processor = load(tmp_path / "stock")
    own = tiny.image_processor(**pictures_of(tiny))
    for width, height in ((50, 30), (31, 64), (40, 40)):
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in own.image_mean))
        square.paste(picture(width, height), ((side - width) // 2, (side - height) // 2))
        expected = own(square, return_tensors="pt")["pixel_values"]
        found = processor.image_processor(picture(width, height), return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape == (1, 3, 32, 32)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("language_model", "name", "end"),
    [
        ("qwen2", "Qwen/Qwen2.5-3B", "<|endoftext|>"),
        ("qwen2", "Qwen/Qwen2-0.5B-Instruct", "<|im_end|>"),
        ("llama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "</s>"),
        ("stablelm", "stabilityai/stablelm-2-zephyr-1_6b", "<|endoftext|>"),
    ],
)
def test_the_prompt_is_the_one_of_the_training(tmp_path, capsys, language_model, name, end):
    tiny = TinyLlava("siglip", language_model, llm_model_name_or_path=name)
    tiny.tokenizer.add_special_tokens({"eos_token": end})
    convert(tiny.save(tmp_path / "tiny"), tmp_path / "stock")
    model, processor = load(tmp_path / "stock")
    sample = encode(Conversation("two", talk(), [picture()]), processor)
    words = processor.tokenizer.decode(sample["input_ids"]).replace("<image>" * 15, "<image>")
    prompt = f"{SYSTEM}USER: <image>\nIs there a scratch? ASSISTANT:"
    assert words == f"{prompt} Yes, one.{end}USER: Where is it? ASSISTANT: at the edge{end}"
    labels = sample["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == f" Yes, one.{end} at the edge{end}"
    for each in (processor, processor.tokenizer):
        assert each.apply_chat_template(talk()[:1], add_generation_prompt=True, tokenize=False) == prompt
    as_text = [{"role": "user", "content": " <image>\nHello "}, {"role": "assistant", "content": "Hi"}]
    assert (
        processor.apply_chat_template(as_text, tokenize=False) == f"{SYSTEM}USER:  <image>\nHello  ASSISTANT: Hi{end}"
    )
    system = [{"role": "system", "content": "Be brief."}, *talk()[:1]]
    assert processor.apply_chat_template(system, tokenize=False).startswith("Be brief. USER: <image>\nIs")
    ends = model.generation_config.eos_token_id
    assert processor.tokenizer.convert_tokens_to_ids(end) in (ends if isinstance(ends, list) else [ends])
    assert f"{end!r}" in capsys.readouterr().out


def test_a_given_template_is_used_and_its_end_of_turn_stops_generate(tmp_path, capsys):
    own = (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tiny = TinyLlava()
    tiny.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    convert(tiny.save(tmp_path / "tiny"), tmp_path / "stock", chat_template=own)
    model, processor = load(tmp_path / "stock")
    assert processor.chat_template == own
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), 0]
    assert "the chat template is the given one" in capsys.readouterr().out


def test_files_of_a_slow_tokenizer_are_enough(tmp_path):
    """Without a word on its class, which then follows from the language model, not from config.json's auto_map."""
    source = TinyLlava().save(tmp_path / "tiny")
    words = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").unlink()
    added = {token["content"]: token["id"] for token in words["added_tokens"]}
    vocab = {word: row for word, row in words["model"]["vocab"].items() if word not in added}
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in words["model"]["merges"]))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(row): {"content": token, **flags} for token, row in added.items()},
        "auto_map": {"AutoTokenizer": ["modeling_tinyllava.Tokenizer", None]},
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "stock")
    _, processor = load(tmp_path / "stock")
    labels = encode(Conversation("two", talk(), [picture()]), processor)["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == " Yes, one.<|endoftext|> at the edge<|endoftext|>"
    assert processor.image_token_id == len(vocab) + len(added)


def test_nothing_of_the_source_is_changed_or_run_and_its_code_is_not_copied(tmp_path, capsys):
    source = TinyLlava().save(tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    convert(source, tmp_path / "new" / "stock")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert os.listdir(tmp_path / "new") == ["stock"]
    written = {path.name for path in (tmp_path / "new" / "stock").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= written
    assert not {name for name in written if name.endswith((".py", ".bin"))}
    for path in (tmp_path / "new" / "stock").glob("*.json"):
        assert "auto_map" not in path.read_text()
    with safe_open(tmp_path / "new" / "stock" / "model.safetensors", framework="pt") as tensors:
        count = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    out = capsys.readouterr().out
    assert (
        f" {count:,} parameters in float32; siglip_vision_model, layer -2, 15 visual tokens an image; a two-layer"
        in out
    )
    assert "TinyLLaVA's qwen2_base" in out


def test_defaults_that_no_shape_can_contradict_are_printed(tmp_path, capsys):
    tiny = TinyLlava()
    tiny.language_model = Qwen2ForCausalLM(
        Qwen2Config(
            **{**tiny.fields["text_config"], "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64}
        )
    ).eval()
    tiny.connector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    for name in ("num_attention_heads", "num_key_value_heads"):
        del tiny.fields["text_config"][name]
    tiny.fields["text_config"]["hidden_size"] = 64
    convert(tiny.save(tmp_path / "tiny"), tmp_path / "stock")
    out = capsys.readouterr().out
    assert "text_config leaves out defaults of qwen2: num_attention_heads 32, num_key_value_heads 32" in out
    assert "rope_theta" not in out
    check_same_logits(tiny, tmp_path / "stock")
