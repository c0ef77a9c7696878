"""The recipe from configuration to table: what it leaves, how it goes on, what it refuses before training."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from dataclasses import replace

import pytest
from recipe_run import load_recipe, write_pair
from transformers import SiglipVisionModel

from switchkd.evaluation import judge
from switchkd.models import load_llava
from switchkd.tasks import load_config
from switchkd.training import stages

ROWS = ["teacher", "undistilled", "Switch-KD", "Switch-KD, blind"]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: its folder, its configuration file, what it printed, the teacher's files before it."""
    folder = tmp_path_factory.mktemp("recipe")
    config = write_pair(folder)
    teacher = hashes(folder / "pair/teacher")
    recipe, blind = load_recipe(), []
    generate = judge.generate_answers

    def spy(*given, blank_image, **options):
        blind.append(blank_image)
        return generate(*given, blank_image=blank_image, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(judge, "generate_answers", spy)
        run = recipe.main(["--config", str(config)])
    assert blind == [False, False, False, True]
    return run, config, printed.getvalue(), teacher


@pytest.fixture
def recipe():
    return load_recipe()


# ---- What it leaves


def test_the_run_folder(done):
    run, config, _, teacher = done
    assert run == config.parent / "runs/plate"
    files = {"config.yaml", "log.jsonl", "results.json", "answers.jsonl", "table.md", "boxes.png"}
    assert {path.name for path in run.iterdir()} == files | {"undistilled", "student", "checkpoints"}
    assert list((run / "checkpoints").iterdir()) == []
    given, kept = (load_config(["--config", str(path)]) for path in (config, run / "config.yaml"))
    assert kept.student.chat_template == load_llava(given.teacher.path)[1].chat_template
    as_teacher = {"chat_template": kept.student.chat_template, "vision_feature_select_strategy": "full"}
    assert kept == replace(given, student=replace(given.student, **as_teacher))
    assert hashes(config.parent / "pair/teacher") == teacher
    assert (run / "boxes.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_printed_and_kept(done):
    run, _, printed, _ = done
    table = (run / "table.md").read_text()
    assert table in printed
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == [*ROWS, "one fixed answer"]
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ROWS
    for name, scores in results.items():
        assert scores["questions"] == dict.fromkeys(("classify", "count", "exists", "locate"), 3)
        assert set(scores["accuracy"]) == {"classify", "count", "exists"}
        model, _ = load_llava(run / "undistilled" if name != "teacher" else run.parents[1] / "pair/teacher")
        assert scores["parameters"] == sum(weight.numel() for weight in model.parameters())


def test_every_answer_of_every_row(done):
    run = done[0]
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == [name for name in ROWS for _ in range(12)]
    assert len({(row["model"], row["id"]) for row in rows}) == 48
    assert len({row["id"] for row in rows}) == 12
    results = json.loads((run / "results.json").read_text())
    for name in ROWS:
        right = [row["correct"] for row in rows if row["model"] == name and row["kind"] == "exists"]
        assert results[name]["accuracy"]["exists"] == pytest.approx(sum(right) / 3)


def test_the_log_has_both_students_step_by_step(done):
    records = [json.loads(line) for line in (done[0] / "log.jsonl").read_text().splitlines()]
    terms = [(r["stage"], r["step"], {"ce", "align", "switch"} & r.keys()) for r in records if "ce" in r]
    supervised = [("undistilled", step, {"ce"}) for step in (1, 2, 3)]
    assert terms == supervised + [("distil", step, {"ce", "align", "switch"}) for step in (1, 2, 3)]
    first = {r["stage"]: r["ce"] for r in records if r["step"] == 1}
    assert first["undistilled"] == pytest.approx(first["distil"], rel=1e-6)  # one start, one first batch
    assert hashes(done[0] / "student")["model.safetensors"] != hashes(done[0] / "undistilled")["model.safetensors"]


# ---- How it goes on


def test_resume_repeats_what_is_missing_and_nothing_else(done, recipe, monkeypatch):
    run = done[0]
    before = hashes(run / "student")
    undistilled = {path.name: path.stat().st_mtime_ns for path in (run / "undistilled").iterdir()}
    shutil.rmtree(run / "student")
    train, trained = stages.train_stage, []

    def spy(task, loaded, stage, run):
        trained.append(stage.name)
        train(task, loaded, stage, run)

    monkeypatch.setattr(stages, "train_stage", spy)
    # Without --config it goes on under the run's own configuration.
    assert recipe.main(["--out", str(run.parent), "--name", run.name, "--resume", "true"]) == run
    assert trained == ["distil"]
    assert hashes(run / "student") == before
    assert {path.name: path.stat().st_mtime_ns for path in (run / "undistilled").iterdir()} == undistilled


def test_a_second_run_gets_its_own_folder_and_the_same_weights(done, recipe):
    run, config, _, _ = done
    before = {path: hashes(run / path) for path in ("student", "undistilled")}
    second = recipe.main([f"--config={config}", "--data.in_memory", "false"])
    assert second.name == "plate-2"
    assert {path: hashes(second / path) for path in before} == before


def test_the_teacher_trains_first_where_it_is_told_to(tmp_path, recipe):
    config = write_pair(tmp_path, teacher={"steps": 2, "lr": 1e-2}, train={"steps": 1})
    run = recipe.main(["--config", str(config)])
    given, trained = hashes(tmp_path / "pair/teacher"), hashes(run / "teacher")
    assert trained["model.safetensors"] != given["model.safetensors"]
    assert trained["tokenizer.json"] == given["tokenizer.json"]
    names = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(names)) == ["teacher", "undistilled", "distil"]


# ---- What it refuses


@pytest.fixture
def refused(tmp_path, recipe, monkeypatch):
    """Runs the recipe, which must stop before any training and leave no folder; the error."""
    config = write_pair(tmp_path)
    monkeypatch.setattr(stages, "train_stage", lambda *_: pytest.fail("the training began"))

    def run(*arguments, error=ValueError):
        with pytest.raises(error) as stop:
            recipe.main(["--config", str(config), *arguments])
        assert not (tmp_path / "runs").exists()
        return str(stop.value)

    return run


def test_an_unknown_key(refused, capsys):
    assert refused("--train.stepps", "3", error=SystemExit) == "2"
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "unrecognized arguments: --train.stepps 3" in shown


def test_a_teacher_of_another_tokenizer(tmp_path, refused):
    path = tmp_path / "pair/teacher/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    message = refused()
    assert "the tokenizers of student" in message
    assert f"'a' has id {vocab['b']} in the student and {vocab['a']} in the teacher" in message
    assert "distil between models of one voc" in message


def test_a_frozen_tower_equal_to_the_teachers(tmp_path, refused):
    teacher, _ = load_llava(tmp_path / "pair/teacher")
    tower = SiglipVisionModel(teacher.config.vision_config)
    tower.load_state_dict(teacher.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "pair/tower")
    message = refused("--distil.freeze", "[vision_tower]", "--train.part_lr", "{}")
    assert "student and teacher share one frozen vision tower" in message
    assert "unfreeze the student's vision tower" in message


def test_a_sample_that_is_cut_and_a_run_that_is_not_there(refused):
    assert "max_length=10 cuts image tokens" in refused("--data.max_length", "10")
    assert "holds no run to resume" in refused("--resume", "true", error=FileNotFoundError)
