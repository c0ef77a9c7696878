"""The run configuration: files, overrides, help, and one line for what is wrong."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from switchkd.config import (
    DataConfig,
    MethodConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
    load_config,
    save_config,
    weight_fields,
)
from switchkd.training import part_rates, training_arguments

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_file_then_command_line(tmp_path):
    path = write(tmp_path / "run.yaml", "name: a\nseed: 3\ntrain: {lr: 1e-4, steps: 7}\nmethod: {switch: null}\n")
    config = load_config(["--config", path, "--train.lr", "2e-3", "--method.align_options.temperature", "2"])
    assert config == RunConfig(
        name="a",
        seed=3,
        train=TrainConfig(lr=2e-3, steps=7),
        method=MethodConfig(switch=None, align_options={"temperature": 2}),
    )
    assert isinstance(config.train.lr, float)


def test_saved_config_reads_back_equal(tmp_path):
    config = RunConfig(
        name="b",
        threads=2,
        data=DataConfig(source="voc", root="/some/where", test_images=5),
        student=StudentConfig(path="hub/name", freeze=("language_model", "projector")),
        method=MethodConfig(align=None, switch_options={"k": 8, "temperature": 1.5}),
        train=TrainConfig(lr=1e-5, encoder_lr=1e-6, bf16=True),
    )
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(["--config", str(tmp_path / "deep" / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{unknown}"], "'train' does not accept option 'lrr'"),
        (["--config", "{top}"], "'nmae' is not accepted"),
        (["--config", "{number}"], "train is 3, it must be a group of fields"),
        (["--config", "{torn}"], "Problems parsing config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--name", "a", "--train.lrr", "1"], "unrecognized arguments: --train.lrr"),
        (["--name", "a", "--train.lr", "fast"], "\"train.lr\": Expected a <class 'float'>. Got value: fast"),
        (["--name", "a", "--train.steps", "1.5"], "\"train.steps\": Expected a <class 'int'>. Got value: 1.5"),
        (["--name", "a", "--train.steps", "0"], "train.steps is 0, it must be 1 or more"),
        (["--name", "a", "--train.lr", "0"], "train.lr is 0.0, it must be above 0"),
        (["--name", "a", "--train.warmup_ratio", "5"], "train.warmup_ratio is 5.0, it must be 0 or more and below 1"),
        (["--name", "a", "--method.switch_weight", "-1"], "method.switch_weight is -1.0, it must be 0 or more"),
        (["--name", "a", "--teacher.steps", "-3"], "teacher.steps is -3, it must be 0 or more"),
        (["--name", "a", "--teacher.lr", "0"], "teacher.lr is 0.0, it must be above 0"),
        (["--name", "a", "--judge.batch_size", "0"], "judge.batch_size is 0, it must be 1 or more"),
        (["--name", "a", "--data.max_bad_rate", "1"], "data.max_bad_rate is 1.0, it must be 0 or more and below 1"),
        (
            ["--name", "a", "--student.freeze", "[vision_tower]", "--train.encoder_lr", "1e-5"],
            "train.encoder_lr is 1e-05 but student.freeze names vision_tower",
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
    for part in fields(RunConfig):
        group = part.default_factory if is_dataclass(part.default_factory) else None
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
    config = RunConfig(name="a")
    same = replace(config, name="b", out="elsewhere", resume=True, threads=1, data=DataConfig(root="moved"))
    assert weight_fields(same) == weight_fields(config)
    other = replace(config, train=TrainConfig(lr=2e-3))
    changed = {name for name, value in weight_fields(other).items() if value != weight_fields(config)[name]}
    assert changed == {"train.lr"}
    assert weight_fields(replace(config, seed=1))["seed"] == 1


def test_training_arguments_follow_the_config(tmp_path):
    config = TrainConfig(steps=9, batch_size=3, warmup_ratio=0.5, checkpoint_every=0, max_grad_norm=0.5, lr=2e-4)
    args = training_arguments(config, tmp_path, seed=5, dataloader_num_workers=1)
    assert (args.max_steps, args.per_device_train_batch_size, args.seed) == (9, 3, 5)
    assert (args.learning_rate, args.max_grad_norm, args.dataloader_num_workers) == (2e-4, 0.5, 1)
    assert args.get_warmup_steps(9) == 5
    assert args.save_strategy == "no"
    assert not args.logging_nan_inf_filter
    assert part_rates(config) == {}
    assert part_rates(TrainConfig(encoder_lr=1e-5)) == {"student.model.vision_tower": 1e-5}
