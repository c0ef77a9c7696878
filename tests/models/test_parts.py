"""Students of any known tower and language model, from saved folders to a reloaded stock checkpoint."""

import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from switchkd.data import Collator, Conversation, encode
from switchkd.methods import SwitchKD
from switchkd.models import assemble_llava
from switchkd.models.config import StudentConfig
from switchkd.models.pathway import pathway_of
from switchkd.models.students import build_student
from switchkd.models.tiny import tiny_llama_tokenizer, tiny_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
PICTURE = Image.effect_noise((40, 48), 90).convert("RGB")


def siglip():
    return SiglipVisionModel(SiglipVisionConfig(**VISION)), SiglipImageProcessorPil(size=SQUARE)


def siglip2():
    """Fixed-resolution SigLIP2 is published as a whole model of type "siglip"."""
    text = {**SHAPE, "vocab_size": 9, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), SiglipImageProcessorPil(size=SQUARE)


def clip():
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    return tower, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)


# model, configuration, its own fields, kind of tokenizer
LANGUAGE_MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}, tiny_tokenizer),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}, tiny_tokenizer),
    "llama": (LlamaForCausalLM, LlamaConfig, {}, tiny_llama_tokenizer),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"pad_token_id": 0}, tiny_llama_tokenizer),
    "phi": (PhiForCausalLM, PhiConfig, {}, tiny_tokenizer),
    "stablelm": (StableLmForCausalLM, StableLmConfig, {"use_qkv_bias": True}, tiny_tokenizer),
}


def language_model(kind):
    model, config, fields, tokenizer = LANGUAGE_MODELS[kind]
    tokenizer = tokenizer()
    fields = {**SHAPE, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id, **fields}
    return model(config(vocab_size=len(tokenizer), **fields)), tokenizer


def batch_of(processor):
    talks = [("Is there any crazing?", "yes"), ("Which defect?", "a patch, größer")]
    samples = []
    for name, (question, answer) in enumerate(talks):
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": asked}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        samples.append(encode(Conversation(str(name), messages, [PICTURE]), processor))
        labels = samples[-1]["labels"]
        end = processor.tokenizer.eos_token
        assert processor.tokenizer.decode(labels[labels != -100]).strip() == answer + end
    return Collator(processor.tokenizer.pad_token_id)(samples)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", [siglip, siglip2, clip])
def test_any_tower_with_any_language_model(tmp_path, tower, kind):
    for part in tower():
        part.save_pretrained(tmp_path / "tower")
    for part in language_model(kind):
        part.save_pretrained(tmp_path / "lm")
    config = StudentConfig(vision_tower=str(tmp_path / "tower"), language_model=str(tmp_path / "lm"))
    student, processor = build_student(config)
    assert student.config.text_config.model_type == kind

    batch = batch_of(processor)
    pixels, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    path = pathway_of(student)
    assert (ids == student.config.image_token_id).sum() == 2 * path.visual_token_count == 32
    with torch.no_grad():
        stock = student.eval()(**batch).logits
        hidden = path.decode(ids, mask, path.project(path.encode(pixels)))
    torch.testing.assert_close(path.head(hidden)[mask.bool()], stock[mask.bool()], atol=1e-5, rtol=1e-5)

    student.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    shutil.rmtree(tmp_path / "lm")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    again = batch_of(AutoProcessor.from_pretrained(tmp_path / "whole"))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, stock)
        for weight in loaded.model.vision_tower.parameters():  # a teacher with a tower of its own
            weight.add_(0.02 * torch.randn_like(weight))

    method = SwitchKD(student, loaded).train()
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    terms = method(**batch)
    terms.loss.backward()
    assert terms.named["switch"] > 0
    torch.optim.SGD([weight for weight in student.parameters() if weight.requires_grad], lr=0.1).step()
    # A key's bias moves all scores of a query alike, and no image token is looked up: those gradients are zero.
    moved = [name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])]
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert {name for name in trained if not name.endswith("k_proj.bias")} <= set(moved)


def test_a_head_bias_has_no_place_in_the_stock_class():
    model, tokenizer = language_model("phi")
    with torch.no_grad():
        model.lm_head.bias[3] = 1.0
    with pytest.raises(ValueError, match="of type 'phi' has a head bias that is not zero, and LlavaForConditionalGen"):
        assemble_llava(siglip()[0], model, tokenizer)


def test_the_llama_kind_gets_its_image_row_and_padding():
    model, tokenizer = language_model("llama")
    rows = len(tokenizer)
    student, processor = assemble_llava(siglip()[0], model, tokenizer)
    assert (student.config.image_token_id, student.lm_head.out_features) == (rows, rows + 1)
    assert processor.tokenizer.pad_token == "<unk>"
    assert student.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    ids = batch_of(processor)["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
