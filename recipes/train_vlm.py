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
    config = load_config(argv)
    if config.distils:
        learning = next(stage.name for stage in config.stages() if stage.method)
        raise ValueError(
            f"stage {learning} learns from a teacher, and this recipe has none: set {learning} to null, or run "
            "recipes/distill_tinyllava.py"
        )
    return train(config)


if __name__ == "__main__":
    sys.exit(one_line(main))
