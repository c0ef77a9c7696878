"""The three additions of CONTRIBUTING.md, run as they are written there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from switchkd import SwitchKD
from switchkd.configs import find
from switchkd.data import read_defects
from switchkd.data.layouts.read import LAYOUTS
from switchkd.models import assemble_llava, freeze
from switchkd.models.pathway import pathway_of
from switchkd.models.tiny import random_llava, tiny_text_config, tiny_tokenizer
from switchkd.models.towers import TOWERS
from switchkd.tasks import load_config

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def block(mark: str) -> str:
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", TEXT, flags=re.DOTALL)
    return found


def module(folder: Path, mark: str):
    name = mark.partition(": ")[2]
    (folder / name).write_text(block(mark))
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_loss_trains_a_batch(tmp_path, monkeypatch, student, teacher, batch):
    (tmp_path / "my_losses.py").write_text(block("loss: my_losses.py"))
    monkeypatch.syspath_prepend(tmp_path)
    program, verb, name, *fields = shlex.split(block("loss: arguments"))
    assert (program, verb) == ("switchkd", "train")
    run = load_config(fields, default=find(name))
    assert run.method.align_options == {"temperature": 2}
    method = SwitchKD(student, teacher, align=run.method.align, align_options=run.method.align_options)
    terms = method(**batch)
    assert 0 < terms.named["align"] <= 1
    terms.loss.backward()
    value = sys.modules["my_losses"].total_variation
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert torch.allclose(value(rows, torch.tensor([[0.0, -torch.inf], [3.0, 3.0]])), torch.tensor([0.5, 0.0]))


def test_the_layout_is_found_and_read(tmp_path, monkeypatch):
    made = module(tmp_path, "layout: csv_boxes.py")
    monkeypatch.setattr("switchkd.data.layouts.read.LAYOUTS", dict(LAYOUTS))
    exec(block("layout: entry"), {"csv_boxes": made})
    data = tmp_path / "plates"
    (data / "images").mkdir(parents=True)
    for name in ("a_2.png", "a_10.png"):
        Image.new("L", (20, 10)).save(data / "images" / name)
    lines = ["a_10.png,0,0,5,5,scratch", "a_2.png,1,2,20,10,pit", "a_2.png,0,0,3,3,scratch"]
    (data / "boxes.csv").write_text("\n".join(lines))
    first, second = read_defects(data)
    assert (first.id, second.id) == ("a_2", "a_10")
    assert (first.boxes, first.labels) == (((1, 2, 20, 10), (0, 0, 3, 3)), ("pit", "scratch"))
    (data / "boxes.csv").write_text("\n".join([*lines, "a_2.png,5,5,5,9,pit", "none.png,0,0,1,1,pit"]))
    with pytest.raises(ValueError, match="is empty or inverted"):
        read_defects(data)
    assert [image.id for image in read_defects(data, max_bad_rate=0.9)] == ["a_10"]
    (data / "boxes.csv").write_text("../../out.png,0,0,1,1,pit\n")
    with pytest.raises(ValueError, match="outside its data root"):
        read_defects(data)


def test_the_tower_enters_a_student_and_the_switch(monkeypatch, tokenizer, teacher, batch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("switchkd.models.towers.TOWERS", dict(TOWERS))
    exec(block("tower: entry"), {})
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    tower = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    text = transformers.Qwen2ForCausalLM(tiny_text_config(tiny_tokenizer(), hidden=32, layers=1))
    student, processor = assemble_llava(tower, text, tiny_tokenizer())
    freeze(student)
    steps = pathway_of(student)
    pixels = batch["pixel_values"]
    assert steps.encode(pixels).shape == (2, 16, 32)
    method = SwitchKD(student, random_llava(tokenizer, hidden=48, vision_hidden=32, vision_layers=2, layers=1,
                                            image_size=32, patch_size=8))  # fmt: skip
    method(**batch).loss.backward()
    without = [name for name, each in student.named_parameters() if each.requires_grad and each.grad is None]
    assert without == []
    assert processor.num_additional_image_tokens == 1
