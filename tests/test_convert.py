"""TinyLLaVA folders of the public layout, written here from plain modules, and what `convert` makes of them."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from switchkd.convert import convert
from switchkd.data import Conversation, encode
from switchkd.models.tiny import tiny_tokenizer

RECIPE = Path(__file__).parents[1] / "recipes/distill_tinyllava.py"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SiglipImageProcessorPil),
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIPImageProcessorPil),
}
LANGUAGE_MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "<|endoftext|>"),
    "llama": (LlamaForCausalLM, LlamaConfig, "</s>"),
    "stablelm": (StableLmForCausalLM, StableLmConfig, "<|endoftext|>"),
}
ROWS = 420


def text_tokenizer(end):
    """The package's words without `<image>`, and the special tokens of a base language model."""
    words = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] == "<|endoftext|>"]
    gone = {"<|im_start|>": "<a>", "<|im_end|>": "<b>", "<image>": "<c>"}
    words["model"]["vocab"] = {gone.get(word, word): row for word, row in words["model"]["vocab"].items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_end|>")])
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}"  # not what it was trained with
    return tokenizer


class TinyLlava:
    """The parts as TinyLLaVA holds them, its forward, and its way of saving them."""

    def __init__(self, tower="siglip", language_model="qwen2", *, rows=ROWS, tied=False, dtype=torch.float32, **fields):
        tower_class, tower_config, self.image_processor = TOWERS[tower]
        text_class, text_config, self.end = LANGUAGE_MODELS[language_model]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.tower = tower_class(tower_config(**sizes, image_size=32, patch_size=8)).to(dtype).eval()
        sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {"vocab_size": rows, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": tied}
        text |= {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
        self.language_model = text_class(text_config(**sizes, **text)).to(dtype).eval()
        self.connector = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 40)).to(dtype)
        self.tokenizer = text_tokenizer(self.end)
        self.fields = {
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "auto_map": {"AutoModelForCausalLM": "modeling_tinyllava.TinyLlavaForConditionalGeneration"},
            "model_type": "tinyllava",
            "llm_model_name_or_path": "Qwen/Qwen2.5-3B",
            "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
            "connector_type": "mlp2x_gelu",
            "image_aspect_ratio": "square",
            "image_token_index": -200,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "patch",
            "tune_type_llm": "full",
            # As transformers 4 wrote them: without the values that are the class's defaults, rope_theta on its own.
            "text_config": {"model_type": language_model, "_name_or_path": "Qwen/Qwen2.5-3B", **sizes, **text},
            "vision_config": {
                "model_type": f"{tower}_vision_model",
                "model_name_or_path": "google/siglip-so400m-patch14-384",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
            **fields,
        }

    def weights(self, *, prefix="vision_model.", head=True):
        names = {f"language_model.{name}": weight for name, weight in self.language_model.state_dict().items()}
        if not head:
            del names["language_model.lm_head.weight"]
        for name, weight in self.tower.state_dict().items():
            names[f"vision_tower._vision_tower.{prefix}{name.removeprefix('vision_model.')}"] = weight
        for name, weight in self.connector.state_dict().items():
            names[f"connector._connector.{name}"] = weight
        return {name: weight.clone() for name, weight in names.items()}

    def save(self, folder, weights=None, *, shards=1):
        folder.mkdir()
        weights = self.weights() if weights is None else weights
        (folder / "config.json").write_text(json.dumps(self.fields))
        (folder / "modeling_tinyllava.py").write_text("raise RuntimeError('remote code ran')")
        self.tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["modeling_tinyllava.Tokenizer", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        files = {
            name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(weights)
        }
        for file in set(files.values()):
            save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return folder

    def forward(self, before, after, picture):
        """Logits of ids `before` the image, its visual tokens, and ids `after`."""
        states = self.tower(picture, output_hidden_states=True).hidden_states[self.fields["vision_feature_layer"]]
        if self.fields["vision_feature_select_strategy"] == "patch":
            states = states[:, 1:]
        words = self.language_model.get_input_embeddings()
        rows = [words(before), self.connector(states), words(after)]
        return self.language_model(inputs_embeds=torch.cat(rows, dim=1)).logits


def ids(tokenizer, text):
    return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def talk():
    turns = [("Is there a scratch?", "Yes, one."), ("Where is it?", "at the edge")]
    messages = []
    for question, answer in turns:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def picture(width=50, height=30):
    return Image.frombytes("RGB", (width, height), bytes(7 * i % 251 for i in range(3 * width * height)))


@torch.no_grad()
def check_same_logits(tiny, folder, atol=1e-5):
    """The model in `folder`, loaded by plain transformers, against TinyLLaVA's own steps on the same conversation."""
    model, processor = load(folder)
    text = processor.apply_chat_template(talk()[:1], add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], images=[picture()], return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    own = tiny.image_processor(**pictures_of(tiny))(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(own.to(model.dtype), batch["pixel_values"])
    before, after = (ids(tiny.tokenizer, part) for part in text.split("<image>"))
    expected = tiny.forward(before, after, own.to(model.dtype))
    found = model(**batch).logits
    assert found.shape[1] == expected.shape[1]
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=atol, rtol=0)
    return model, processor


def pictures_of(tiny):
    square = {"height": 32, "width": 32}
    return (
        {"size": {"shortest_edge": 32}, "crop_size": square}
        if tiny.tower.config.model_type.startswith("clip")
        else {"size": square}
    )


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


def refused(tmp_path, source, error, message, **options):
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "stock", **options)
    assert not (tmp_path / "stock").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava"}, r"config.json has model_type 'llava', not 'tinyllava'"),
        ({"connector_type": "linear"}, "connector_type 'linear': the stock LLaVA class can only express 'mlp2x_gelu'$"),
        ({"connector_type": "mlp3x_gelu"}, "connector_type 'mlp3x_gelu'"),
        ({"connector_type": "qformer"}, "connector_type 'qformer'"),
        ({"connector_type": "resampler"}, "connector_type 'resampler'"),
        ({"connector_type": None}, "connector_type None"),
        ({"vision_feature_select_strategy": "full"}, "strategy 'full': .* express 'patch' and 'cls_patch'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres': .* express 'square' and 'pad'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]: it must be one number"),
        ({"text_config": None}, "has text_config.model_type None: only qwen2, llama, stablelm are converted$"),
        (
            {"vision_config": {"hidden_size": 32}},
            "vision_config.model_type None: only siglip_vision_model, clip_vision",
        ),
        ({"text_config": {"model_type": "openelm"}}, "text_config.model_type 'openelm': only qwen2, llama, stablelm"),
        ({"text_config": {"model_type": "phi"}}, r"'phi' \(its head has a bias, which the stock LLaVA class lacks\)"),
        ({"text_config": {"model_type": "gemma"}}, r"'gemma' \(it scales visual tokens, which the stock LLaVA class"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type 'dinov2': only siglip_vision_model"),
    ],
)
def test_what_the_stock_class_cannot_express_is_refused(tmp_path, fields, message):
    refused(tmp_path, TinyLlava(**fields).save(tmp_path / "tiny"), ValueError, message)


def test_missing_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path, tmp_path / "empty", FileNotFoundError, "empty/config.json does not exist: give the folder of a Tiny"
    )
    source = TinyLlava().save(tmp_path / "words")
    (source / "tokenizer.json").unlink()
    refused(tmp_path, source, FileNotFoundError, r"no tokenizer files \(.*: copy those of Qwen/Qwen2.5-3B into it")
    source = TinyLlava().save(tmp_path / "shards", shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, source, FileNotFoundError, "index.json lists model-00002-of-00002.safetensors, which is not in")
    source = TinyLlava().save(tmp_path / "none")
    (source / "model.safetensors").unlink()
    refused(tmp_path, source, FileNotFoundError, "neither model.safetensors nor model.safetensors.index.json")
    (source / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, source, ValueError, "as pytorch_model.bin, a pickle, .* save_pretrained.*safe_serialization=True")


def test_torn_json_is_named(tmp_path):
    source = TinyLlava().save(tmp_path / "tiny", shards=2)
    for name in ("model.safetensors.index.json", "config.json"):
        (source / name).write_text((source / name).read_text()[:-9])
        refused(tmp_path, source, ValueError, f"{name} is not JSON .*: download it again")


def test_an_index_reaches_no_file_outside_the_folder(tmp_path):
    source = TinyLlava().save(tmp_path / "tiny", shards=2)
    index = source / "model.safetensors.index.json"
    (source / "model-00002-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "../outside.safetensors"))
    refused(tmp_path, source, FileNotFoundError, r"lists ../outside.safetensors, which is not in")


def test_places_that_would_lose_something_are_refused(tmp_path):
    source = TinyLlava().save(tmp_path / "tiny")
    with pytest.raises(ValueError, match="tiny exists already: name a new folder, or remove it first"):
        convert(source, source)
    with pytest.raises(ValueError, match=r"stock lies in .*tiny, which stays as it is: name a folder outside it"):
        convert(source, source / "stock")
    assert not (source / "stock").exists()


def test_a_torn_file_is_refused(tmp_path):
    source = TinyLlava().save(tmp_path / "tiny")
    whole = (source / "model.safetensors").read_bytes()
    for length in (len(whole) // 2, 4):
        (source / "model.safetensors").write_bytes(whole[:length])
        refused(
            tmp_path, source, ValueError, r"model.safetensors is not a whole safetensors file \(.*\): download it again"
        )


def test_every_tensor_is_accounted_for(tmp_path):
    tiny = TinyLlava()
    weights = tiny.weights()
    weights["connector._connector.4.weight"] = torch.zeros(2)
    del weights["language_model.model.norm.weight"]
    message = (
        r"1 are unknown or twice there \['connector._connector.4.weight'\], "
        r"1 are missing \['model.language_model.norm.weight'\]"
    )
    refused(tmp_path, tiny.save(tmp_path / "a", weights), ValueError, message)
    weights = tiny.weights()
    name = "vision_tower._vision_tower.vision_model.embeddings.patch_embedding.bias"
    weights[name.replace("vision_model.", "")] = weights[name].clone()
    refused(tmp_path, tiny.save(tmp_path / "b", weights), ValueError, "1 are unknown or twice there")
    refused(tmp_path, tiny.save(tmp_path / "c", tiny.weights(head=False)), ValueError, r"missing \['lm_head.weight'\]")
    weights = tiny.weights()
    weights["connector._connector.0.weight"] = torch.zeros(40, 31)
    message = r"connector._connector.0.weight in .* has shape \(40, 31\), but config.json makes it \(40, 32\)"
    refused(tmp_path, tiny.save(tmp_path / "d", weights), ValueError, message)


def test_a_tied_head_of_other_values_is_refused(tmp_path):
    tiny = TinyLlava(tied=True)
    weights = tiny.weights()
    weights["language_model.lm_head.weight"] += 1
    message = "stored with other values, but text_config.tie_word_embeddings is true"
    refused(tmp_path, tiny.save(tmp_path / "tiny", weights), ValueError, message)


def test_a_foreign_tokenizer_or_template_is_refused(tmp_path):
    rows = len(text_tokenizer("</s>"))
    source = TinyLlava(rows=rows - 1).save(tmp_path / "a")
    refused(
        tmp_path, source, ValueError, f"has {rows} tokens, but text_config.vocab_size is {rows - 1}: it is not this"
    )
    source = TinyLlava("siglip", "stablelm").save(tmp_path / "b")
    refused(
        tmp_path,
        source,
        ValueError,
        "^chat_template does not write an image and its question as one <image>",
        chat_template="{{ 'a' }}",
    )


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("switchkd.convert.put_in_place", full)
    refused(tmp_path, TinyLlava().save(tmp_path / "tiny"), OSError, "no space left")


def test_the_recipe_distils_from_a_converted_teacher(tmp_path):
    """The assembled student takes the teacher's turns and drops the first visual token as it does."""
    torch.manual_seed(0)
    made = TinyLlava()
    convert(made.save(tmp_path / "source"), tmp_path / "teacher")
    SiglipVisionModel(made.tower.config).save_pretrained(tmp_path / "tower")
    made.language_model.save_pretrained(tmp_path / "words")
    text_tokenizer(made.end).save_pretrained(tmp_path / "words")
    config = {
        "name": "converted",
        "out": str(tmp_path / "runs"),
        "data": {"train_images": 4, "test_images": 2, "kinds": ["exists"]},
        "teacher": {"path": str(tmp_path / "teacher")},
        "student": {"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "words")},
        "train": {"steps": 2, "batch_size": 2, "logging_steps": 1, "checkpoint_every": 0},
        "judge": {"batch_size": 4, "max_new_tokens": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    run = recipe.main(["--config", str(tmp_path / "run.yaml")])
    processor = AutoProcessor.from_pretrained(run / "student")
    assert processor.vision_feature_select_strategy == "default"
    assert processor.chat_template == AutoProcessor.from_pretrained(tmp_path / "teacher").chat_template
    ids = processor(text="<image>", images=[Image.new("RGB", (32, 32))])["input_ids"][0]
    assert list(ids).count(processor.image_token_id) == 15  # of 4 x 4
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(record["switch"] > 0 for record in records if record["stage"] == "student" and "ce" in record)
