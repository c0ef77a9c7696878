"""The configurations that are shipped, in a clone and in an installed package alike."""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path

from switchkd.config_file import read_yaml

CLONE = Path(__file__).parents[1] / "recipes" / "configs"
INSTALLED = "share/switchkd/configs/*.yaml"  # as pyproject.toml places them


def shipped() -> list[Path]:
    """The files, by name: those of the clone, or of the installed package."""
    if CLONE.is_dir():
        return sorted(CLONE.glob("*.yaml"))
    return sorted(Path(file.locate()).resolve() for file in files("switchkd") or () if file.match(INSTALLED))


def find(name: str | Path) -> Path:
    """The file `name`, or the shipped configuration of that name, with or without .yaml.

    Raises FileNotFoundError naming those that there are.
    """
    if Path(name).is_file():
        return Path(name)
    found = {file.stem: file for file in shipped()}
    if str(name).removesuffix(".yaml") not in found:
        raise FileNotFoundError(f"{name} is neither a file nor a shipped configuration: known are {', '.join(found)}")
    return found[str(name).removesuffix(".yaml")]


def summary(file: Path) -> str:
    """The first sentence of the comment that a shipped configuration begins with."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return " ".join(words).partition(". ")[0].rstrip(".")


def copy(names: list[str], folder: Path) -> list[Path]:
    """Copies the shipped configurations of these names, and those that make their teachers, into `folder`.

    Raises FileExistsError, and copies nothing, where a file of that name is there already.
    """
    chosen = [find(name) for name in names]
    for file in list(chosen):
        if made_by := (read_yaml(file).get("teacher") or {}).get("made_by"):
            chosen.append(file.parent / made_by)
    chosen = list(dict.fromkeys(chosen))
    if taken := [file.name for file in chosen if (folder / file.name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(taken)} already: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, folder / file.name)) for file in chosen]
