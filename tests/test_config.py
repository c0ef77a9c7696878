"""The run configuration: files, overrides, help, and one line for what is wrong."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from switchkd.config import save_config, weight_fields
from switchkd.data.config import DataConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.models.config import StudentConfig
from switchkd.tasks import load_config
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_file_then_command_line(tmp_path):
    path = write(tmp_path / "run.yaml", "name: a\nseed: 3\ntrain: {lr: 1e-4, steps: 7}\nmethod: {switch: null}\n")
    config = load_config(["--config", path, "--train.lr", "2e-3", "--method.align_options.temperature", "2"])
    assert config == Run(
        name="a",
        seed=3,
        train=TrainConfig(lr=2e-3, steps=7),
        method=SwitchKDConfig(switch=None, align_options={"temperature": 2}),
    )
    assert isinstance(config.train.lr, float)


def test_saved_config_reads_back_equal(tmp_path):
    config = Run(
        name="b",
        out=str(tmp_path / "runs"),
        threads=2,
        data=DataConfig(source="voc", root="/some/where", test_images=5),
        student=StudentConfig(path="hub/name"),
        distil=StageConfig(freeze=("language_model", "projector")),
        method=SwitchKDConfig(
            align=None,
            switch_options={"k": 8, "temperature": 1.5},
            feature="relation",
            feature_weight=0.5,
            switch_adapter="linear",
        ),
        train=TrainConfig(lr=1e-5, part_lr={"vision_tower": 1e-6}, bf16=True),
    )
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(["--config", str(tmp_path / "deep" / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{unknown}"], "'train' does not accept option 'lrr'"),
        (["--config", "{top}"], "'nmae' is not accepted"),
        (["--config", "{number}"], "train is 3, it must be a group of fields"),
        (["--config", "{torn}"], "torn.yaml is not a YAML file that can be read"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--name", "a", "--train.lrr", "1"], "unrecognized arguments: --train.lrr"),
        (["--name", "a", "--train.lr", "fast"], "\"train.lr\": Expected a <class 'float'>. Got value: fast"),
        (
            ["--name", "a", "--train.batch_size", "1.5"],
            "\"train.batch_size\": Expected a <class 'int'>. Got value: 1.5",
        ),
        (["--name", "a", "--train.steps", "1.5"], '"train.steps": Does not validate'),
        (["--name", "a", "--train.epochs", "0"], "train.epochs is 0.0, it must be above 0"),
        (["--name", "a", "--train.lora_alpha", "8"], "train.lora_alpha is 8.0 but train.lora_rank is left out"),
        (["--name", "a", "--train.lora_dropout", "0.1"], "train.lora_dropout is 0.1 but train.lora_rank is left out"),
        (
            ["--name", "a", "--train.lora_parts", "[projector]"],
            "train.lora_parts is ('projector',) but train.lora_rank",
        ),
        (["--name", "a", "--train.lora_rank", "4", "--train.lora_parts", "[]"], "train.lora_parts names no part"),
        (
            ["--name", "a", "--train.lora_rank", "4", "--train.lora_parts", "[projector, head]"],
            "train.lora_parts names 'head', which is no part: known are vision_tower, projector, language_model",
        ),
        (
            ["--name", "a", "--distil.freeze", "[projector]", "--train.lora_rank=4", "--train.lora_parts=[projector]"],
            "train.lora_rank is 4, with adapters on projector, but distil.freeze names it",
        ),
        (
            ["--name", "a", "--train.global_batch_size", "8", "--train.gradient_accumulation_steps", "2"],
            "train.global_batch_size is 8 and train.gradient_accumulation_steps 2: keep one of them",
        ),
        (
            ["--name", "a", "--distil.freeze", "[language_model]", "--train.lora_rank", "8"],
            "train.lora_rank is 8, with adapters on language_model, but distil.freeze names it",
        ),
        (
            ["--name", "a", "--distil.freeze", "[vision_tower, projector, language_model]"],
            "distil.freeze names every part of the student, so that nothing is trained",
        ),
        (["--name", "a", "--distil.freeze", "[vision]"], "distil"),
        (["--config", "{stage}"], "sft.train.part_lr.projector is 0.001 but sft.freeze names projector: drop one"),
        (["--config", "{weight}"], "data.mixture: the weight of a.json is -1.0, it must be above 0"),
        (["--name", "a", "--train.steps", "0"], "train.steps is 0, it must be 1 or more"),
        (["--name", "a", "--train.lr", "0"], "train.lr is 0.0, it must be above 0"),
        (["--name", "a", "--train.warmup_ratio", "5"], "train.warmup_ratio is 5.0, it must be 0 or more and below 1"),
        (["--name", "a", "--method.switch_weight", "-1"], "method.switch_weight is -1.0, it must be 0 or more"),
        (["--name", "a", "--method.feature_weight", "-1"], "method.feature_weight is -1.0, it must be 0 or more"),
        (["--name", "a", "--method.feature", "cos"], '"method.feature": Does not validate'),
        (
            ["--name", "a", "--method.switch", "null", "--method.switch_adapter", "linear"],
            "method.switch_adapter is linear but method.switch and method.feature are null",
        ),
        (["--name", "a", "--teacher.steps", "-3"], "teacher.steps is -3, it must be 0 or more"),
        (["--name", "a", "--teacher.lr", "0"], "teacher.lr is 0.0, it must be above 0"),
        (["--name", "a", "--judge.batch_size", "0"], "judge.batch_size is 0, it must be 1 or more"),
        (["--name", "a", "--data.max_bad_rate", "1"], "data.max_bad_rate is 1.0, it must be 0 or more and below 1"),
        (
            ["--name", "a", "--distil.freeze", "[vision_tower]", "--train.part_lr.vision_tower", "1e-5"],
            "train.part_lr.vision_tower is 1e-05 but distil.freeze names vision_tower",
        ),
        (["--name", "a", "--student.path", "x", "--student.language_model", "y"], "student.language_model is also"),
        (["--name", "a/b"], "name is 'a/b', it must be the name of one folder"),
        (["--train.lr", "1"], "required: name"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, arguments, message):
    files = {
        "unknown": "name: a\ntrain: {lrr: 1}\n",
        "top": "name: a\nnmae: b\n",
        "number": "name: a\ntrain: 3\n",
        "torn": "name: a\ntrain: [1\n",
        "stage": "name: a\nsft:\n  data: {}\n  train: {part_lr: {projector: 1e-3}}\n  freeze: [projector]\n",
        "weight": "name: a\ndata: {mixture: [{source: llava, root: x, split: a.json, weight: -1}]}\n",
    }
    paths = {name: write(tmp_path / f"{name}.yaml", text) for name, text in files.items()}
    with pytest.raises(SystemExit) as stop:
        load_config([argument.format(**paths) for argument in arguments], prog="run")
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("run: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    entries = " ".join(capsys.readouterr().out.split()).split(" --")
    for part in fields(Run):
        group = part.default_factory if is_dataclass(part.default_factory) and part.name != "distil" else None
        for name in [f"{part.name}.{f.name}" for f in fields(group)] if group else [part.name]:
            # The usage comes first, the list of fields after it.
            texts = [entry.removeprefix(name) for entry in entries if entry.startswith(f"{name} ")]
            assert "type: " in texts[-1], name
            text = texts[-1].partition("(type: ")[0].replace("(required,", "").strip(" (")
            assert len(text.split()) > 2, f"{name} has no text of its own: {texts[-1]}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_config_loads(path):
    assert load_config(["--config", str(path)]).name


def test_data_folder_is_given_set_or_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert DataConfig(source="voc", root="$SOME_DATA").folder() == tmp_path
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(ValueError, match=r"data.root is \$SOME_DATA and that variable is not set"):
        DataConfig(source="voc", root="$SOME_DATA").folder()
    with pytest.raises(ValueError, match="data.source is voc: give data.root"):
        DataConfig(source="voc").folder()
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        DataConfig(source="voc", root=str(tmp_path / "nowhere")).folder()


def test_fields_that_decide_the_weights():
    config = Run(name="a", data=DataConfig(source="voc", root="here"))
    moved = replace(config.data, root="moved")
    same = replace(config, name="b", out="elsewhere", resume=True, threads=1, data=moved)
    assert weight_fields(same) == weight_fields(config)
    other = replace(config, train=TrainConfig(lr=2e-3))
    changed = {name for name, value in weight_fields(other).items() if value != weight_fields(config)[name]}
    assert changed == {"train.lr"}
    assert weight_fields(replace(config, seed=1))["seed"] == 1


STAGED = """
name: a
pretrain:
  freeze: [vision_tower, language_model]
  data: {source: llava, root: $IMAGES, train_split: captions.json, test_split: null}
  train: {lr: 1e-3, global_batch_size: 256}
data:
  mixture:
    - {source: llava, root: x, split: a.json, weight: 0.5}
train: {lora_rank: 8, lora_alpha: 16}
"""


def test_stages_in_order_each_with_its_own_fields(tmp_path):
    path = write(tmp_path / "run.yaml", STAGED)
    config = load_config(["--config", path, "--pretrain.train.lr", "2e-3", "--distil.freeze", "[projector]"])
    first, _, last = config.stages()
    assert [each.name for each in config.stages()] == ["pretrain", "undistilled", "distil"]
    assert first.train == TrainConfig(lr=2e-3, global_batch_size=256)
    assert (first.freeze, first.method, first.data.test_split) == (("vision_tower", "language_model"), None, None)
    assert (last.freeze, last.method, last.train) == (("projector",), config.method, config.train)
    assert last.data.mixture[0].weight == 0.5
    config = replace(config, out=str(tmp_path / "runs"))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config
    fields_of_weights = weight_fields(config)
    assert fields_of_weights["pretrain.train.lr"] == 2e-3
    assert "pretrain.data.root" not in fields_of_weights
    assert fields_of_weights["data.mixture.0.weight"] == 0.5
    assert "data.mixture.0.root" not in fields_of_weights
    assert fields_of_weights["sft"] is None


@pytest.mark.parametrize("flag", ["--tiny", "--resume"])
def test_a_bare_flag_is_true(flag):
    name = flag.removeprefix("--")
    assert getattr(load_config(["--name", "a", flag]), name)
    assert getattr(load_config([flag, "--name", "a"]), name)
    assert not getattr(load_config([flag, "false", "--name", "a"]), name)


@pytest.mark.parametrize(
    ("settings", "processes", "steps", "accumulation"),
    [
        ({"epochs": 1}, 1, 7, 1),  # 100 samples in batches of 16
        ({"epochs": 2.5}, 1, 18, 1),
        ({"epochs": 5, "batch_size": 128}, 1, 5, 1),
        ({"epochs": 1, "gradient_accumulation_steps": 4}, 1, 2, 4),
        ({"epochs": 3, "gradient_accumulation_steps": 4}, 1, 6, 4),  # each epoch begins a step of its own
        ({"epochs": 1, "global_batch_size": 64}, 2, 2, 2),
        ({"steps": 9, "global_batch_size": 32}, 2, 9, 1),
    ],
)
def test_steps_and_accumulation_follow_from_samples_and_processes(settings, processes, steps, accumulation):
    settled = TrainConfig(**settings).settled(100, processes)
    assert (settled.steps, settled.gradient_accumulation_steps) == (steps, accumulation)
    assert settled.global_batch_size is None


def test_a_global_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"global_batch_size is 40 but 2 processes of train.batch_size 16 make 32"):
        TrainConfig(global_batch_size=40).settled(100, 2)
