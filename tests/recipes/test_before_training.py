"""What only a later stage or the judging needs is found out before the first stage trains, and is one line."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from recipe_run import load_recipe, write_pair
from safetensors.torch import load_file, save_file

from switchkd.training import stages


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs the recipe, which must stop before any training and leave no folder; the error."""
    config = write_pair(tmp_path)
    monkeypatch.setattr(stages, "train_stage", lambda *_: pytest.fail("the training began"))

    def run(*arguments, error=ValueError):
        with pytest.raises(error) as stop:
            load_recipe().main(["--config", str(config), *arguments])
        assert not (tmp_path / "runs").exists()
        assert "\n" not in str(stop.value)
        return str(stop.value)

    return run


def change(path, **values):
    settings = json.loads(path.read_text())
    for name, value in values.items():
        settings.pop(name) if value is None else settings.update({name: value})
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower.encoder.layers.0"])
def test_a_teacher_whose_file_lacks_a_part(tmp_path, refused, part):
    file = tmp_path / "pair/teacher/model.safetensors"
    state = load_file(file)
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    assert len(kept) < len(state)
    save_file(kept, file, metadata={"format": "pt"})
    message = refused()
    assert "teacher.path" in message
    assert str(len(state) - len(kept)) in message
    assert part in message


@pytest.mark.parametrize(
    ("setting", "value"), [("patch_size", None), ("patch_size", 16), ("num_additional_image_tokens", 3)]
)
def test_a_teachers_processor_that_counts_other_image_tokens_than_its_model(tmp_path, refused, setting, value):
    change(tmp_path / "pair/teacher/processor_config.json", **{setting: value})
    assert "teacher" in refused()


@pytest.mark.parametrize("field", ["teacher.path", "student.vision_tower", "student.language_model"])
def test_what_is_not_on_the_disk_offline_names_its_field(refused, field):
    message = refused(f"--{field}", "nobody/nothing", error=OSError)
    assert field in message
    assert "nobody/nothing" in message


def test_a_disk_without_room_for_the_students(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "GB free, and 2 stages leave students of" in refused(error=OSError)


def test_lora_that_peft_cannot_do(refused, monkeypatch):
    monkeypatch.setattr("switchkd.models.lora.inject_adapter_in_model", None, raising=False)
    monkeypatch.setattr("peft.inject_adapter_in_model", None)
    message = refused("--train.lora_rank", "2")
    assert "train.lora_rank is 2, but LoRA does not work here" in message


def test_an_attention_that_this_machine_cannot_compute(refused):
    message = refused("--train.attn_implementation", "flash_attention_2")
    assert "train.attn_implementation is flash_attention_2: " in message


@pytest.mark.parametrize("arguments", [[], ["--undistilled", "false", "--sft", "{}"]])
@pytest.mark.parametrize("by_file", [True, False])
def test_several_stages_under_zero_3(tmp_path, refused, monkeypatch, arguments, by_file):
    if by_file:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    else:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "ZeRO-3 trains one stage in a process, and this run has 2 (" in refused(*arguments)
