"""A vision-language model from a vision tower and a language model: pretrain, then supervised fine-tuning.

    accelerate launch recipes/train_vlm.py --config recipes/configs/tinyllava_3b.yaml
    accelerate launch recipes/train_vlm.py --config recipes/configs/tinyllava_3b.yaml --tiny

The teacher of recipes/distill_tinyllava.py, where none is at hand. The same configuration without its teacher: `distil`
is null, `student` is the model that is made, and it ends in runs/NAME/student.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from switchkd.tasks import load_config
from switchkd.train import one_line, train


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs every stage that is not finished yet, judges, and returns the run's folder."""
    return train(load_config(argv), distils=False)


if __name__ == "__main__":
    sys.exit(one_line(main))
