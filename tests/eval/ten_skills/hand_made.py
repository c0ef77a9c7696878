"""Results written by hand."""

from __future__ import annotations

from eval.records import append
from eval.ten_skills import world
from eval.ten_skills.bench import NOT_EVIDENCE

CHANCE = {"validation": 25.0, "test": 26.0}  # of every skill; of locate 9.0


def record(path, variant, start, seed, value, split="validation", **more):
    """Adds a record to the file."""
    made = {"size": "cpu", "variant": variant, "start": start, "seed": seed, "split": split, "average": value}
    made |= {"skills": dict.fromkeys(world.SKILLS, value), "locate": 7.0}
    made |= {"chance": {**dict.fromkeys(world.SKILLS, CHANCE[split]), "locate": 9.0}}
    made |= {"curve": [[5, value - 1], [10, value]], "steps": 10, "lr": 0.1, "seconds": 60.0, "settings": "0"}
    made |= {"commit": f"made-{split}", "machine": f"m-{split}", "evidence": NOT_EVIDENCE}
    assert append(path, made | more)
