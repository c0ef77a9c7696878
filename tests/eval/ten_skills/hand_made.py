"""A result written by hand."""

from __future__ import annotations

from eval.ten_skills import world
from eval.ten_skills.bench import NOT_EVIDENCE, Run, write_json


def record(folder, variant, start, seed, value, split="validation", **more):
    run = Run(variant, start, seed, split)
    skills = dict.fromkeys(world.SKILLS, value)
    made = {"size": "cpu", "variant": variant, "start": start, "seed": seed, "split": split, "average": value}
    made |= {"skills": skills, "locate": 7.0, "chance": {**dict.fromkeys(world.SKILLS, 25.0), "locate": 9.0}}
    made |= {"steps": 10, "lr": 0.1, "seconds": 60.0, "commit": "abc", "machine": "m", "evidence": NOT_EVIDENCE}
    write_json(folder / run.file, made | more)
