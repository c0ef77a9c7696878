"""A run's folder: what a run leaves behind, and where the next command finds it.

runs/NAME/config.yaml  log.jsonl  results.json  answers.jsonl  table.md  boxes.png
          teacher/  pretrain/  sft/  undistilled/  student/    stock checkpoints, student/ that of the last stage
          sft-adapter/  student-adapter/                       of a stage with LoRA: its adapters, a PEFT folder
          checkpoints/STAGE/                                   what an unfinished stage resumes from
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.config import load, save_config, weight_fields

RESULTS = "results.json"  # written last: a run that has it is finished


class Stopped(KeyboardInterrupt):
    """A run that was interrupted. reached: what is left of it, in words; run: its folder."""

    def __init__(self, reached: str, run: RunFolder):
        super().__init__(reached)
        self.resume = ["--name", run.path.name, "--out", str(run.path.parent), "--resume"]


class RunFolder:
    """The folder of one run. `path`: where it is. `config`: the configuration of its task, `name` filled in."""

    def __init__(self, path: Path, config: Any):
        self.path = path
        self.config = config

    @classmethod
    def start(cls, config: Any) -> RunFolder:
        """A new folder, `out/name`, or `out/name-2`, `-3` ... where a finished run has that name: none is overwritten.

        Raises FileExistsError where the run of that name is not finished, OSError where the folder cannot be written.
        """
        path = config.folder
        for number in itertools.count(2):
            try:
                path.mkdir(parents=True)  # also right when two runs start at once
                break
            except FileExistsError:
                cls._refuse_unfinished(path)
                path = config.folder.with_name(f"{config.name}-{number}")
            except OSError as error:
                way_out = f"{path} cannot be made ({error.strerror}): give another --out"
                raise OSError(f"out is {config.out} and {way_out}") from error
        config = replace(config, name=path.name)
        save_config(config, path / "config.yaml", out="..")  # wherever the folder of all runs is moved to
        return cls(path, config)

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises, before anything is read, what `start` and `resume` can tell of the folder alone."""
        if config.resume:
            cls._refuse_missing(config)
        else:
            cls._refuse_unfinished(config.folder)

    @staticmethod
    def _refuse_missing(config: Any) -> None:
        if not (config.folder / "config.yaml").is_file():
            raise FileNotFoundError(
                f"{config.folder} holds no run to resume: start without --resume, or give --name of a folder in "
                f"{config.out}"
            )

    @staticmethod
    def _refuse_unfinished(path: Path) -> None:
        if (path / "config.yaml").is_file() and not (path / RESULTS).is_file():
            reached = [stage.name for stage in path.glob("checkpoints/*") if any(stage.iterdir())]
            where = f", in stage {', '.join(reached)}" if reached else ""
            raise FileExistsError(
                f"{path} holds a run that is not finished{where}: go on with it (--name {path.name} --out "
                f"{path.parent} --resume), or give this one another --name"
            )

    @classmethod
    def resume(cls, config: Any) -> RunFolder:
        """The folder `out/name` of a run that began earlier.

        Raises FileNotFoundError where it is missing, ValueError naming the field where it ran under another
        configuration.
        """
        path = config.folder
        cls._refuse_missing(config)
        before, now = (
            weight_fields(load(type(config), ["--config", str(path / "config.yaml")])),
            weight_fields(config),
        )
        for field in [*now, *(before.keys() - now.keys())]:
            old, new = before.get(field, "not set"), now.get(field, "not set")
            if old != new:
                raise ValueError(
                    f"{path / 'config.yaml'} has {field} {old}, this run {new}: resume with the same "
                    "configuration, or start a new run without --resume"
                )
        return cls(path, config)

    def model(self, folder: str) -> Path:
        """Folder of a stage's stock checkpoint; it exists only when the stage is finished."""
        return self.path / folder

    def checkpoints(self, stage: str) -> Path:
        """What the stage of that name resumes from while it is not finished."""
        return self.path / "checkpoints" / stage

    def write(self, name: str, content: dict | list[dict]) -> None:
        """Writes one JSON file, or JSON lines for a list; in place only when whole."""
        lines = content if isinstance(content, list) else None
        text = json.dumps(content, indent=2) if lines is None else "".join(json.dumps(row) + "\n" for row in lines)
        self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        staged = self.path / f".{name}.incomplete"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, self.path / name)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))
