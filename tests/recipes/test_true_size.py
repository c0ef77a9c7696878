"""The true-size configurations, rehearsed: every stage on tiny parts, what each trains, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipe_run import RECIPES, load_recipe
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from switchkd.models import shared_vocab
from switchkd.tasks import load_config
from switchkd.tasks.vlm_rehearsal import rehearse

PAIRS = ("tinyllava_3b_to_0.5b", "tinyllava_3b_to_0.5b_lora", "clip_7b_to_1.5b", "llava_7b_to_1.1b")
FOLDERS = {"pretrain": "pretrain", "sft": "sft", "undistilled": "undistilled", "distil": "student"}  # by stage


def arguments(name, out, *more):
    return ["--config", str(RECIPES / f"configs/{name}.yaml"), "--tiny", "--out", str(out), *more]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Rehearses a pair once; its run folder."""
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = load_recipe().main(arguments(name, tmp_path_factory.mktemp(name)))
        return runs[name]

    return run


def weights(folder, part):
    """The tensors of one part, by name; LLaVA's names on disk."""
    parts = {"vision_tower": "vision_tower", "projector": "multi_modal_projector", "language_model": "language_model"}
    state = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if name.removeprefix("model.").startswith(parts[part])}


def moved(before, after, part):
    before, after = weights(before, part), weights(after, part)
    assert before.keys() == after.keys() != set()
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", PAIRS)
def test_every_stage_ends_in_a_stock_checkpoint_and_trains_its_parts(rehearsed, name):
    run = rehearsed(name)
    assert run.name == f"{name}-tiny"
    for folder in FOLDERS.values():
        model = AutoModelForImageTextToText.from_pretrained(run / folder)
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        assert AutoProcessor.from_pretrained(run / folder).chat_template
        assert not (run / folder / "adapter_config.json").exists()
    for before, after, trained in (
        ("pretrain", "sft", {"projector", "language_model"}),
        ("sft", "undistilled", {"vision_tower", "projector", "language_model"}),
        ("sft", "student", {"vision_tower", "projector", "language_model"}),
    ):
        parts = ("vision_tower", "projector", "language_model")
        assert {part for part in parts if moved(run / before, run / after, part)} == trained, (before, after)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(r["stage"] for r in records)) == list(FOLDERS)
    assert {r["stage"] for r in records if "switch" in r} == {"distil"}


def test_the_adapters_of_a_stage_on_its_start_are_its_student(rehearsed):
    run = rehearsed("tinyllava_3b_to_0.5b_lora")
    assert {path.name for path in run.glob("*-adapter")} == {"sft-adapter", "undistilled-adapter", "student-adapter"}
    for start, stage in (("pretrain", "sft"), ("sft", "undistilled"), ("sft", "student")):
        model = AutoModelForImageTextToText.from_pretrained(run / start)
        merged = PeftModel.from_pretrained(model, run / f"{stage}-adapter").merge_and_unload().state_dict()
        made = AutoModelForImageTextToText.from_pretrained(run / stage).state_dict()
        assert merged.keys() == made.keys()
        for name, weight in made.items():
            torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)


def test_pretraining_moves_the_projector_alone(rehearsed):
    run = rehearsed("tinyllava_3b_to_0.5b")
    parts = run.parent / ".tinyllava_3b_to_0.5b-tiny"
    tower = load_file(parts / "vision_tower/model.safetensors")
    exported = weights(run / "pretrain", "vision_tower")
    assert len(tower) == len(exported)
    assert sorted(tensor.sum().item() for tensor in tower.values()) == sorted(
        tensor.sum().item() for tensor in exported.values()
    )
    rows = load_file(parts / "language_model/model.safetensors")["model.embed_tokens.weight"]
    (exported,) = [t for n, t in weights(run / "pretrain", "language_model").items() if "embed_tokens" in n]
    assert torch.equal(rows, exported)


def test_what_a_rehearsal_keeps_of_its_configuration(tmp_path):
    config = load_config(arguments("clip_7b_to_1.5b", tmp_path))
    tiny = rehearse(config)
    assert tiny == rehearse(config)
    assert not tiny.tiny
    for stage, small in zip(config.stages(), tiny.stages(), strict=True):
        assert small.name == stage.name
        assert (small.freeze, small.method, small.data.max_length) == (stage.freeze, stage.method, 2048)
        assert (small.train.lr, small.train.part_lr) == (stage.train.lr, stage.train.part_lr)
        assert small.train.group_by_length == stage.train.group_by_length
        assert small.train.gradient_accumulation_steps == 2
    rows, tokenizers = [], []
    for path in (tiny.student.language_model, tiny.teacher.path):
        saved = json.loads((Path(path) / "config.json").read_text())
        rows.append(saved.get("text_config", saved)["vocab_size"])
        tokenizers.append(AutoProcessor.from_pretrained(path) if path == tiny.teacher.path else None)
    assert rows[0] != rows[1]  # as 151,936 and 152,064
    tokenizer = tokenizers[1].tokenizer
    assert shared_vocab(tokenizer, tokenizer) <= min(rows)
    vision = json.loads((Path(tiny.student.vision_tower) / "config.json").read_text())
    assert vision["model_type"] == "clip_vision_model"


@pytest.mark.parametrize("name", ["tinyllava_3b", "clip_7b"])
def test_the_teacher_is_made_by_the_other_recipe(tmp_path, name):
    run = load_recipe("train_vlm").main(arguments(name, tmp_path))
    assert {"pretrain", "student"} <= {path.name for path in run.iterdir()}
    AutoModelForImageTextToText.from_pretrained(run / "student")
    again = load_recipe("train_vlm").main(arguments(name, tmp_path, "--resume"))
    assert again == run


def test_recipes_refuse_each_others_configurations(tmp_path):
    with pytest.raises(ValueError, match=r"distil is null, so that nothing is distilled: run recipes/train_vlm"):
        load_recipe().main(arguments("tinyllava_3b", tmp_path))
    with pytest.raises(ValueError, match=r"stage distil learns from a teacher, and this recipe has none"):
        load_recipe("train_vlm").main(arguments("tinyllava_3b_to_0.5b", tmp_path))


def test_a_teacher_that_is_not_made_yet_is_named_with_the_command(tmp_path):
    given = [each for each in arguments("tinyllava_3b_to_0.5b", tmp_path) if each != "--tiny"]
    with pytest.raises(FileNotFoundError, match=r"make it with accelerate launch recipes/train_vlm.py --config"):
        load_recipe().main(given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return load_recipe().main(
        arguments("tinyllava_3b_to_0.5b_lora", tmp_path_factory.mktemp("whole"), "--threads", "1")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "place"), [("pretrain", "2"), ("pretrain", "end"), ("sft", "2"), ("undistilled", "end"), ("distil", "2")]
)
def test_killed_between_and_inside_stages_it_resumes_to_the_same_bytes(tmp_path, whole, stage, place):
    given = arguments("tinyllava_3b_to_0.5b_lora", tmp_path, "--threads", "1")
    script = Path(__file__).with_name("killed_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, str(script), stage, place, *given], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / whole.name
    done = list(FOLDERS.values())[: list(FOLDERS).index(stage) + (place == "end")]
    assert [folder for folder in FOLDERS.values() if (run / folder).exists()] == done
    assert load_recipe().main([*given, "--resume"]) == run
    for name in FOLDERS.values():
        for file in (whole / name).iterdir():
            assert (run / name / file.name).read_bytes() == file.read_bytes(), file
