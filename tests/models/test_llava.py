import json
import logging

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from switchkd.models import assemble_llava, freeze, load_llava
from switchkd.models.llava import recompute_activations
from switchkd.models.pathway import pathway_of
from switchkd.models.tiny import CHAT_TEMPLATE, tiny_text_config, tiny_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("tower", "strategy"),
    [
        (SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32, patch_size=8)), "full"),
        (CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=32, patch_size=8)), "default"),
    ],
)
def test_assembled_models_save_and_load_as_stock(tmp_path, tower, strategy):
    tokenizer = tiny_tokenizer()
    text = tiny_text_config(tokenizer, hidden=32, layers=2)
    language_model = Qwen2ForCausalLM(text)
    model, processor = assemble_llava(tower, language_model, tokenizer, chat_template=CHAT_TEMPLATE)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, processor = load_llava(tmp_path)
    assert loaded.config.vision_feature_select_strategy == strategy
    inputs = processor(text=["<image> yes"], images=[torch.zeros(3, 32, 32)], return_tensors="pt")
    assert (inputs["input_ids"] == loaded.config.image_token_id).sum() == 16
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    word = tower.state_dict()["embeddings.patch_embedding.weight"]
    assert torch.equal(loaded.model.vision_tower.state_dict()["embeddings.patch_embedding.weight"], word)
    weight = language_model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(loaded.model.language_model.layers[1].mlp.up_proj.weight, weight)


def test_a_tokenizer_without_the_image_token_gets_one_row():
    tokenizer = tiny_tokenizer()
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words["added_tokens"] = [t for t in words["added_tokens"] if t["content"] != "<image>"]
    words["model"]["vocab"] = {("<gone>" if k == "<image>" else k): v for k, v in words["model"]["vocab"].items()}
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    rows = len(bare)
    language_model = Qwen2ForCausalLM(tiny_text_config(bare, hidden=32, layers=2))
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32, patch_size=8))
    model, processor = assemble_llava(tower, language_model, bare, chat_template=CHAT_TEMPLATE)
    assert model.config.image_token_id == rows
    assert model.lm_head.out_features == model.config.text_config.vocab_size == rows + 1
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == rows


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_the_parts_are_shared_not_copied(tied, processor, batch):
    text = tiny_text_config(processor.tokenizer, hidden=32, layers=1)
    text.tie_word_embeddings = tied
    language_model = Qwen2ForCausalLM(text)
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32, patch_size=8)).half()
    logits = language_model.eval()(input_ids=batch["input_ids"][:, 16:]).logits
    model, _ = assemble_llava(tower, language_model, tiny_tokenizer())
    for part, given in ((model.model.language_model, language_model.model), (model.model.vision_tower, tower)):
        assert all(ours is theirs for ours, theirs in zip(part.parameters(), given.parameters(), strict=True))
    assert model.lm_head.weight is language_model.lm_head.weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=batch["input_ids"][:, 16:]).logits, logits)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        ((), {"vision_tower", "multi_modal_projector", "language_model"}),
        (("vision_tower",), {"multi_modal_projector", "language_model"}),
        (("language_model", "vision_tower"), {"multi_modal_projector"}),
    ],
)
def test_freeze_by_part(student, parts, trained):
    freeze(student, parts)
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == trained


def test_what_no_output_depends_on_is_always_frozen(student, batch):
    student.config.vision_feature_layer = -2
    freeze(student)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    student.requires_grad_(True)
    student(**batch).loss.backward()
    assert frozen == {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert any("layers.1" in name for name in frozen)


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputing_runs_no_backward_through_a_frozen_tower(student, batch, frozen):
    freeze(student, ["vision_tower"] if frozen else [])
    recompute_activations(student)
    layer = student.model.language_model.layers[0].mlp
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(True))
    assert pathway_of(student.train()).encode(batch["pixel_values"]).requires_grad != frozen
    student(**batch).loss.backward()
    assert len(calls) == 2


def test_freeze_names_the_known_parts(student):
    with pytest.raises(ValueError, match="'tower'.* is not a part of the model; known are vision_tower, projector"):
        freeze(student, ["tower"])


def test_loading_what_is_not_there_or_not_llava(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json: give the folder of a saved LLaVA model"):
        load_llava(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_llava(tmp_path / "nowhere")
    Qwen2ForCausalLM(tiny_text_config(tiny_tokenizer(), hidden=32, layers=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'qwen2', not 'llava'"):
        load_llava(tmp_path)


def test_no_pickled_weights_are_loaded(tmp_path, student):
    student.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(student.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_llava(tmp_path)


def test_loading_is_silent(tmp_path, student, processor, caplog):
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_llava(tmp_path)
    assert not [r for r in caplog.records if "newly initialized" in r.getMessage()]
