"""`python killed_run.py STAGE PLACE ARGUMENTS`: the recipe, killed with SIGKILL in a stage: after a step (a number), or
right after its export ("end"), before the next stage begins."""

from __future__ import annotations

import os
import signal
import sys

from recipe_run import load_recipe

from switchkd.training import DistillTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(stage: str, place: str, arguments: list[str]) -> None:
    train_step, export = DistillTrainer.training_step, DistillTrainer.export_student

    def training_step(trainer, *given):
        here = trainer.step_log.fields["stage"] == stage and str(trainer.state.global_step) == place
        return kill() if here else train_step(trainer, *given)

    def export_student(trainer, folder):
        export(trainer, folder)
        if trainer.step_log.fields["stage"] == stage and place == "end":
            kill()

    DistillTrainer.training_step, DistillTrainer.export_student = training_step, export_student
    load_recipe().main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
