"""What convert refuses, and that it then leaves nothing behind."""

import importlib.util
import json

import pytest
import torch
import yaml
from PIL import Image
from tiny_llava_folder import (
    RECIPE,
    TinyLlava,
    text_tokenizer,
)
from transformers import (
    AutoProcessor,
    SiglipVisionModel,
)

from switchkd.convert import convert


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
