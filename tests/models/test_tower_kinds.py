"""Another kind of vision tower is one entry of the table, with which it distils, saves, rehearses and plans."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from switchkd.data import Collator, Conversation, encode
from switchkd.data.config import DataConfig
from switchkd.methods import SwitchKD
from switchkd.models import freeze, load_llava
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.students import build_student
from switchkd.models.tiny import CHAT_TEMPLATE, tiny_text_config, tiny_tokenizer
from switchkd.models.towers import TOWERS, TowerKind
from switchkd.plan import make_plan
from switchkd.tasks.vlm_config import Run
from switchkd.tasks.vlm_rehearsal import rehearse

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
KINDS = {
    "dinov2": (
        TowerKind(
            Dinov2Model,
            BitImageProcessorPil,
            class_token=True,
            crops=True,
            layers="encoder.layer",
            unread=("layernorm", "embeddings.mask_token"),
        ),
        Dinov2Config(**SHAPE),
    ),
    "vit": (
        TowerKind(ViTModel, ViTImageProcessorPil, class_token=True, layers="layers", unread=("layernorm", "pooler")),
        ViTConfig(**SHAPE, intermediate_size=64),
    ),
}


@pytest.fixture(params=KINDS)
def student(request, tmp_path, monkeypatch):
    """The configuration of a student with a saved tower of a kind that the package's table does not have."""
    kind, shape = KINDS[request.param]
    monkeypatch.setitem(TOWERS, request.param, kind)
    kind.model(shape).save_pretrained(tmp_path / "tower")
    kind.own_image_processor(32).save_pretrained(tmp_path / "tower")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "lm")
    Qwen2ForCausalLM(tiny_text_config(tokenizer, hidden=32, layers=1)).save_pretrained(tmp_path / "lm")
    return StudentConfig(vision_tower=str(tmp_path / "tower"), language_model=str(tmp_path / "lm"))


def batch_of(processor):
    picture = Image.effect_noise((40, 48), 90).convert("RGB")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there any crazing?"}]}
    messages = [asked, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    return Collator(processor.tokenizer.pad_token_id)([encode(Conversation("0", messages, [picture]), processor)])


def test_a_tower_of_another_kind_distils_and_loads_as_a_stock_model(tmp_path, student):
    model, processor = build_student(student)
    assert processor.image_processor.__class__ in {kind.image_processor for kind, _ in KINDS.values()}
    batch = batch_of(processor)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16  # patches without the class token
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, model.eval()(**batch).logits)
    assert AutoProcessor.from_pretrained(tmp_path / "whole").num_additional_image_tokens == 1

    teacher, _ = load_llava(tmp_path / "whole")
    with torch.no_grad():
        for weight in teacher.model.vision_tower.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    method = SwitchKD(model, teacher).train()
    terms = method(**batch)
    terms.loss.backward()
    assert terms.named["switch"] > 0
    # All that trains gets a gradient, or DDP would wait for it, and the rest is all that the projector does not read.
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name
    untrained = {name for name, weight in model.model.vision_tower.named_parameters() if not weight.requires_grad}
    assert untrained
    assert all("2." in name or name.startswith(("layernorm", "pooler", "embeddings.mask")) for name in untrained)
    freeze(model, ["vision_tower"])
    assert not any(weight.requires_grad for weight in model.model.vision_tower.parameters())


def test_a_tower_of_another_kind_rehearses_and_plans(tmp_path, student):
    model, processor = build_student(student)
    model.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    teacher, data = TeacherConfig(path=str(tmp_path / "teacher")), DataConfig(train_images=4, test_images=4)
    run = Run(name="run", out=str(tmp_path), teacher=teacher, student=student, data=data)
    plan = make_plan(run, gpus=1)
    assert [problem.text for problem in plan.problems if problem.stops] == []
    assert plan.visual_tokens == 16
    assert sum(map(sum, plan.student.values())) == model.num_parameters()
    tiny = rehearse(run)
    rehearsed, _ = build_student(tiny.student)
    assert rehearsed.config.vision_config.model_type == model.config.vision_config.model_type
    assert rehearsed.config.vision_config.hidden_size == 32
