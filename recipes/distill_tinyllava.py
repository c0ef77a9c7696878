"""Switch-KD from data to table: teacher, undistilled student and Switch-KD student, judged on the same questions.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/distill_tinyllava.py     the quickstart
    accelerate launch recipes/distill_tinyllava.py --config recipes/configs/neu_det.yaml --data.root DIR
    accelerate launch recipes/distill_tinyllava.py --config recipes/configs/tinyllava_3b_to_0.5b.yaml --tiny
    accelerate launch recipes/distill_tinyllava.py --name quickstart --resume           go on after an interruption
    accelerate launch recipes/distill_tinyllava.py --help                               every field

Stages run one after the other, each from the student that the one before it made; a finished one is not repeated. The
undistilled student is the stage distil without the teacher: the same start, samples, order, steps and rates. The blind
row is the Switch-KD student with every picture replaced by an even grey one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from switchkd.tasks import load_config
from switchkd.train import one_line, train

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs every stage that is not finished yet, judges, and returns the run's folder."""
    return train(load_config(argv, default=QUICKSTART), distils=True)


if __name__ == "__main__":
    sys.exit(one_line(main))
