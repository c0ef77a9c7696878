from dataclasses import replace

import pytest
from hand_made import record
from tiny_size import TINY

from eval.ten_skills import __main__ as command
from eval.ten_skills.bench import NOT_EVIDENCE
from eval.ten_skills.report import Results


def test_what_is_done_is_skipped_and_other_settings_are_refused(bench, monkeypatch, capsys):
    monkeypatch.setitem(command.SIZES, "cpu", replace(TINY, pieces=("core",)))
    flags = ["--seeds", "1", "--workers", "1", "--out", str(bench.out), "--work", str(bench.work.parent)]
    command.main([*flags, "--pieces", "core", "--minutes", "0"])
    assert "runs are left" in capsys.readouterr().out
    assert not list(bench.out.glob("*.json"))
    command.main(flags)
    assert not list(bench.out.glob("test-*.json"))
    command.main([*flags, "--confirm"])
    made = {path: path.stat().st_mtime_ns for path in bench.out.glob("*.json")}
    assert {path.name.split("-")[0] for path in made} == {"validation", "test"}
    command.main(flags)
    assert {path: path.stat().st_mtime_ns for path in bench.out.glob("*.json")} == made
    monkeypatch.setitem(command.SIZES, "cpu", replace(TINY, pieces=("core",), lr=1e-4))
    with pytest.raises(ValueError, match="was made under settings"):
        command.main(flags)
    assert NOT_EVIDENCE in (bench.out / "cpu.md").read_text()
    assert {path.name for path in bench.out.glob("*.png")} == {"cpu-bars.png", "cpu-curves.png"}


def test_jobs_come_after_what_they_need():
    runs = command.runs_of(["core", "encoder"], (0, 1))
    seen = set()
    for job in command.jobs_of(runs):
        assert seen.issuperset(job.needs), job
        seen.add(job.name)
    assert [job.name for job in command.jobs_of(runs)].count("start apart 0 False") == 1


def test_an_unknown_piece_is_refused():
    with pytest.raises(ValueError, match="unknown pieces \\['cores'\\]"):
        command.runs_of(["cores"], (0,))


def test_the_confirmation_is_chosen_on_validation_alone(tmp_path):
    for seed in (0, 1, 2):
        for start in ("apart", "teacher"):
            record(tmp_path, "sft", start, seed, 40.0)
            record(tmp_path, "switch_kd", start, seed, 45.0)
        record(tmp_path, "kl_switch", "apart", seed, 46.0)
    for seed in (3, 4, 5):
        record(tmp_path, "jsd", "apart", seed, 90.0, split="test")
    runs = command.confirm_runs(Results.of(tmp_path, "cpu"), (0, 1, 2), (3, 4, 5))
    assert {run.variant for run in runs} == {"teacher", "sft", "switch_kd", "kl_switch"}
    assert {run.split for run in runs} == {"test"}
    assert {run.seed for run in runs if run.start} == {3, 4, 5}
    (tmp_path / "validation-switch_kd-teacher-0.json").unlink()
    (tmp_path / "validation-sft-apart-0.json").unlink()
    with pytest.raises(ValueError, match="nothing to confirm yet"):
        command.confirm_runs(Results.of(tmp_path, "cpu"), (0, 1, 2), (3, 4, 5))
