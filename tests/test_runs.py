"""The run folder: never overwritten, resumed only as it was, files whole or as before."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from switchkd.data.config import DataConfig, MixtureConfig
from switchkd.methods.switch_kd_config import SwitchKDConfig
from switchkd.runs import RESULTS, RunFolder
from switchkd.tasks import load_config
from switchkd.tasks.vlm_config import Run, StageConfig
from switchkd.training.config import TrainConfig


@pytest.fixture
def config(tmp_path):
    return Run(name="plate", out=str(tmp_path / "runs"), train=TrainConfig(lr=1e-3))


def test_no_run_is_overwritten(config, tmp_path):
    runs = []
    for _ in range(3):
        runs.append(RunFolder.start(config))
        runs[-1].write(RESULTS, {"run": len(runs)})
    assert [run.path.name for run in runs] == ["plate", "plate-2", "plate-3"]
    assert [run.config.name for run in runs] == ["plate", "plate-2", "plate-3"]
    assert [run.read("results.json")["run"] for run in runs] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["plate", "plate-2", "plate-3"]


@pytest.mark.parametrize("reached", ["", "pretrain", "distil"])
def test_a_run_that_is_not_finished_is_not_passed_over(config, reached):
    started = RunFolder.start(config)
    if reached:
        (started.checkpoints(reached) / "checkpoint-2").mkdir(parents=True)
    where = f", in stage {reached}: " if reached else ": "
    with pytest.raises(
        FileExistsError, match=rf"plate holds a run that is not finished{where}go on with it \(--name pl"
    ):
        RunFolder.start(config)
    assert [path.name for path in started.path.parent.iterdir()] == ["plate"]
    assert RunFolder.resume(config).path == started.path


def test_an_unwritable_folder_of_runs_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"out is .*file/runs and .* cannot be made \(Not a directory\): give another --out"
    ):
        RunFolder.start(replace(config, out=str(tmp_path / "file/runs")))


def test_a_folder_of_runs_that_was_moved_resumes(config, tmp_path):
    RunFolder.start(config)
    (tmp_path / "runs").rename(tmp_path / "moved")
    read = load_config(["--config", str(tmp_path / "moved/plate/config.yaml")])
    assert RunFolder.resume(read).path == tmp_path / "moved/plate"


def test_a_file_or_dead_link_of_the_name_is_left_alone(config, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/plate").write_text("mine")
    (tmp_path / "runs/plate-2").symlink_to(tmp_path / "nowhere")
    assert RunFolder.start(config).path.name == "plate-3"
    assert (tmp_path / "runs/plate").read_text() == "mine"


def test_the_configuration_reads_back_under_the_folders_name(config):
    config = replace(
        config,
        seed=4,
        data=DataConfig(source="voc", root="$SOMEWHERE/x", train_images=7),
        distil=StageConfig(freeze=("vision_tower",)),
        method=SwitchKDConfig(switch=None, align_options={"temperature": 2.0}),
    )
    RunFolder.start(config).write(RESULTS, {})
    run = RunFolder.start(config)
    assert load_config(["--config", str(run.path / "config.yaml")]) == run.config == replace(config, name="plate-2")


def test_resume_is_the_same_folder(config):
    started = RunFolder.start(config)
    started.write("results.json", {"a": 1})
    elsewhere = replace(config, resume=True, threads=1, data=replace(config.data, in_memory=True))
    resumed = RunFolder.resume(elsewhere)
    assert resumed.path == started.path
    assert resumed.read("results.json") == {"a": 1}
    assert resumed.model("student") == started.path / "student"
    assert resumed.checkpoints("student") == started.path / "checkpoints" / "student"


def test_resume_of_a_missing_run(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{config.folder} holds no run to resume: start without --resume, or"):
        RunFolder.resume(config)
    config.folder.mkdir(parents=True)  # a folder alone is no run
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        RunFolder.resume(config)
    assert list(config.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "has seed 0, this run 1"),
        ({"train": TrainConfig(lr=2e-3)}, r"has train\.lr 0\.001, this run 0\.002"),
        ({"method": SwitchKDConfig(switch=None)}, r"has method\.switch dbild, this run None"),
        ({"distil": StageConfig(freeze=("projector",))}, r"has distil\.freeze \[\], this run \['projector'\]"),
    ],
)
def test_resume_under_another_configuration(config, change, message):
    RunFolder.start(config)
    with pytest.raises(ValueError, match=rf"plate/config\.yaml {message}: resume with the same configuration, or"):
        RunFolder.resume(replace(config, **change))


def test_fields_that_only_one_of_the_configurations_has_are_compared(config):
    stage = StageConfig(freeze=("projector",))
    part = MixtureConfig("llava", "images", "a.json")
    mixed = replace(config, data=replace(config.data, mixture=(part, replace(part, weight=3.0))))
    for before, now, field in (
        (replace(config, pretrain=stage), config, "pretrain"),
        (config, replace(config, pretrain=stage), "pretrain"),
        (mixed, replace(mixed, data=replace(mixed.data, mixture=(part,))), "data.mixture.1"),
        (mixed, config, "data.mixture"),
    ):
        started = RunFolder.start(before)
        started.write(RESULTS, {})
        with pytest.raises(ValueError, match=rf"has {field}.*not set"):
            RunFolder.resume(replace(now, name=started.path.name))


def test_files_are_json_and_json_lines(config):
    run = RunFolder.start(config)
    run.write("results.json", {"a": [1, None]})
    run.write("answers.jsonl", [{"a": "ä\n"}, {"b": 2}])
    run.write("answers.jsonl", [{"a": "ä\n"}, {"b": 3}])
    assert json.loads((run.path / "results.json").read_text()) == {"a": [1, None]}
    assert [json.loads(line) for line in (run.path / "answers.jsonl").read_text().splitlines()] == [
        {"a": "ä\n"},
        {"b": 3},
    ]
    assert sorted(path.name for path in run.path.iterdir()) == ["answers.jsonl", "config.yaml", "results.json"]


def test_a_write_that_fails_leaves_the_old_file(config, monkeypatch):
    run = RunFolder.start(config)
    run.write("results.json", {"a": 1})
    write_text = type(run.path).write_text

    def full_disk(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run.path), "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run.write("results.json", {"a": 2, "b": "long" * 100})
    monkeypatch.undo()
    assert run.read("results.json") == {"a": 1}
    run.write("results.json", {"a": 3})
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "results.json"]
