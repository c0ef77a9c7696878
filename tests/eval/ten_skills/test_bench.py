from dataclasses import replace

import pytest
import torch
from tiny_size import TINY

from eval.records import Job
from eval.ten_skills import world
from eval.ten_skills.bench import NOT_EVIDENCE, Bench
from eval.ten_skills.fast_step import average


def test_a_run_is_the_same_twice_and_another_seed_is_not(bench, tmp_path):
    job = Job("switch_kd", "apart", 0, "validation")
    first = bench.run(job)
    torch.manual_seed(99)  # what came before must not matter
    again = Bench(TINY, tmp_path / "work2").run(job)
    other = bench.run(Job("switch_kd", "apart", 1, "validation"))
    assert (first["average"], first["weights"]) == (again["average"], again["weights"])
    assert first["weights"] != other["weights"]
    wanted = "size average skills locate chance steps lr curve losses weights"
    assert set(wanted.split()) <= set(first)
    assert first["evidence"] == NOT_EVIDENCE
    assert first["average"] == pytest.approx(average(first["skills"]))
    assert list(first["skills"]) == list(world.SKILLS)


def test_variants_of_a_seed_begin_at_the_same_student(bench):
    starts = [bench.start("apart", 0).state_dict() for _ in range(2)]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    twin = bench.start("teacher", 0).model.vision_tower.state_dict()
    teachers = bench.teacher().model.vision_tower.state_dict()
    assert all(torch.equal(twin[name], teachers[name]) for name in twin)


def test_a_blind_student_stays_near_chance(bench):
    size = replace(TINY, steps=150, samples=2200, batch_size=32, judged=2200, start_steps=0, lr=1e-2)
    blind = Bench(size, bench.work.parent).run(Job("blind", "apart", 0, "validation"))
    chance = average(blind["chance"])
    assert chance - 6 < blind["average"] < chance + 3
    assert all(blind["skills"][name] < blind["chance"][name] + 8 for name in world.SKILLS)


def test_equal_flops_takes_more_steps(bench):
    ratio = bench.flops_ratio()
    assert 1.5 < ratio < 10
    assert bench.run(Job("sft_equal_flops", "apart", 0, "validation"))["steps"] == round(TINY.steps * ratio)
