from dataclasses import replace

import pytest
from hand_made import record
from tiny_size import TINY

from eval.records import Job, Refused, Results, read
from eval.runner import variants_of
from eval.ten_skills import __main__ as command
from eval.ten_skills.bench import NOT_EVIDENCE
from eval.ten_skills.variants import PIECES, VARIANTS

OWN = """
import torch

def cosine(student_logits, teacher_logits):
    return 1 - torch.cosine_similarity(student_logits, teacher_logits, dim=-1)
"""


@pytest.fixture
def tiny(monkeypatch):
    """Three rows that train in a second."""
    size = replace(TINY, pieces=("rows",))
    monkeypatch.setitem(command.SIZES, "cpu", size)
    rows = tuple(VARIANTS[name] for name in ("sft", "kl_align", "switch_kd"))
    monkeypatch.setitem(PIECES, "rows", rows)
    return size


@pytest.fixture
def flags(tmp_path):
    return ["--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]


def test_what_is_done_is_skipped_and_other_settings_are_refused(tiny, flags, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out" / "cpu.jsonl"
    command.main([*flags, "--pieces", "rows", "--minutes", "0"])
    assert "runs are left" in capsys.readouterr().out
    assert not path.exists()
    command.main(flags)
    records = read(path)
    assert {each["split"] for each in records} == {"validation"}
    assert {"machine", "commit", "seconds", "settings", "weights", "chance", "curve"} <= records[-1].keys()
    command.main([*flags, "--confirm"])
    made = path.read_text()
    assert {each["split"] for each in read(path)} == {"validation", "test"}
    command.main(flags)
    command.main([*flags, "--confirm"])
    assert path.read_text() == made
    assert NOT_EVIDENCE in (tmp_path / "out" / "cpu.md").read_text()
    assert {file.name for file in path.parent.glob("*.png")} == {"cpu-bars.png", "cpu-curves.png"}
    monkeypatch.setitem(command.SIZES, "cpu", replace(tiny, lr=1e-4))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(flags)
    assert "was made under settings" in capsys.readouterr().err


def test_a_function_of_ones_own_adds_a_row_and_a_changed_one_is_refused(tiny, flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "their_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    own = [*flags, "--variant", "their_losses:cosine"]
    command.main(flags)
    before = read(tmp_path / "out" / "cpu.jsonl")
    command.main(own)
    after = read(tmp_path / "out" / "cpu.jsonl")
    added = [Job.of(each) for each in after[len(before) :]]
    assert Job("their_losses:cosine", "apart", 0, "validation") in added
    assert {job.variant for job in added} <= {"their_losses:cosine", "kl_align", "switch_kd"}  # and the best found
    report = (tmp_path / "out" / "cpu.md").read_text()
    row = next(line for line in report.splitlines() if line.startswith("| their_losses:cosine |"))
    average = next(each["average"] for each in after if each["variant"] == "their_losses:cosine")
    assert row.split(" | ")[1] == f"{average:.1f}"
    command.main(own)
    assert read(tmp_path / "out" / "cpu.jsonl") == after

    (tmp_path / "their_losses.py").write_text(OWN.replace("1 - torch", "2 - torch"))
    monkeypatch.delitem(__import__("sys").modules, "their_losses")
    __import__("importlib").invalidate_caches()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(own)
    assert "the record of validation-their_losses:cosine-apart-0 was made under settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--pieces", "cores", "unknown pieces ['cores']; known are core, divergence"),
        ("--pieces", "core,", "unknown pieces ['']"),
        ("--variant", "kl_swich", "unknown variant 'kl_swich' (did you mean kl_switch?)"),
        ("--variant", "no_such_module:loss", "divergence 'no_such_module:loss': there is no module"),
        ("--variant", "switchkd.losses.dbild:dbild_los", "did you mean dbild_loss?"),
        ("--seeds", "4", "invalid choice: 4"),
    ],
)
def test_a_wrong_choice_is_one_line(flag, value, message, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*flags, flag, value])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_steps_come_after_what_they_need():
    jobs = command.jobs_of(variants_of(PIECES, ["core", "few", "encoder"]), (0, 1))
    assert len(set(jobs)) == len(jobs)
    steps, seen = command.steps_of(jobs), set()
    for step in steps:
        assert seen.issuperset(step.needs), step
        seen.add(step.name)
    assert [step.name for step in steps].count("start apart 0 False") == 1
    assert {step.job for step in steps} - {None} == set(jobs)


def test_the_confirmation_is_chosen_on_validation_alone(tmp_path):
    def written(path, left_out=()):
        for start in ("apart", "teacher"):
            for seed in (0, 1, 2):
                for name, value in (("sft", 40.0), ("switch_kd", 45.0)):
                    if (name, start, seed) not in left_out:
                        record(path, name, start, seed, value)
        for seed in (0, 1, 2):
            record(path, "kl_switch", "apart", seed, 46.0)
        for seed in (3, 4, 5):
            record(path, "jsd", "apart", seed, 90.0, split="test")
        return Results.of(path)

    jobs = command.confirm_jobs(written(tmp_path / "whole"), (0, 1, 2), (3, 4, 5))
    assert {job.variant for job in jobs} == {"teacher", "sft", "switch_kd", "kl_switch"}
    assert {job.split for job in jobs} == {"test"}
    assert {job.seed for job in jobs if job.start} == {3, 4, 5}
    without = written(tmp_path / "less", {("sft", "apart", 0), ("switch_kd", "teacher", 0)})
    with pytest.raises(Refused, match="nothing to confirm yet"):
        command.confirm_jobs(without, (0, 1, 2), (3, 4, 5))
