"""A size of the ten skills that trains in a second."""

from __future__ import annotations

from dataclasses import replace

from eval.ten_skills.sizes import SIZES

TINY = replace(
    SIZES["cpu"],
    **{"vision": (16, 1), "teacher": (24, 1), "student": (16, 1), "narrow": (8, 1)},
    **{"tower_steps": 3, "apart_steps": 2, "tower_batch": 8, "teacher_steps": 4, "teacher_samples": 66},
    **{"start_steps": 2, "steps": 5, "samples": 66, "batch_size": 8, "teacher_batch": 8, "judged": 110},
)
